"""Low-precision number formats: types, rounding, scales, packing and the quantised array.

The operation that turns arrays into a ``QTensor`` is ``pallas_kernels.quantize``.
"""

from pallas_kernels.formats.block_format import FORMATS, SCALE_RULES, BlockFormat, get_format
from pallas_kernels.formats.fp8 import FP8_E4M3, FP8_E5M2
from pallas_kernels.formats.hadamard import TE_SIGNS, hadamard_matrix, inverse_rht, rht
from pallas_kernels.formats.integer import INT4, INT4_INT8, INT8
from pallas_kernels.formats.mx import MXFP4, MXFP4_INT8, MXFP8
from pallas_kernels.formats.nf4 import NF4_VALUES, NF4Tensor, quantize_nf4
from pallas_kernels.formats.number_types import FloatType, IntType, number_type, number_type_of
from pallas_kernels.formats.nvfp4 import NVFP4
from pallas_kernels.formats.packing import pack_codes, unpack_codes
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.rounding import round_to, stochastic_round

__all__ = [
    "FORMATS",
    "FP8_E4M3",
    "FP8_E5M2",
    "INT4",
    "INT4_INT8",
    "INT8",
    "MXFP4",
    "MXFP4_INT8",
    "MXFP8",
    "NF4_VALUES",
    "NVFP4",
    "SCALE_RULES",
    "TE_SIGNS",
    "BlockFormat",
    "FloatType",
    "IntType",
    "NF4Tensor",
    "QTensor",
    "get_format",
    "hadamard_matrix",
    "inverse_rht",
    "number_type",
    "number_type_of",
    "pack_codes",
    "quantize_nf4",
    "rht",
    "round_to",
    "stochastic_round",
    "unpack_codes",
]

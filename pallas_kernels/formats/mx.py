"""mxfp8 and mxfp4: OCP microscaling, blocks of 32 with a power-of-two (e8m0) scale.

The default rule ``floor`` is OCP's: the largest values of a block may saturate.
``scale_rule="ceil"`` never saturates. e8m0 has no zero and NaN is 0xFF: a zero block stores scale
1, a block with NaN or inf stores NaN. Scales below 2^-126 are not used.
"""

from pallas_kernels.formats.block_format import BlockFormat, register

MXFP8 = register("mxfp8", BlockFormat("e4m3", 32, "e8m0"))
MXFP4 = register("mxfp4", BlockFormat("e2m1", 32, "e8m0"))

"""nvfp4: e2m1 codes, blocks of 16 with an e4m3 scale, and a float32 scale for the tensor.

``two_level=False`` drops the tensor scale; blocks below amax 6·2^-9 then share the smallest scale,
so use it for data near 1 only. Block scales are clamped at 2^-9, the smallest e4m3 value, which a
zero block stores too (TransformerEngine stores 0 there); ``scale_min=2**-6`` reproduces torchao.
"""

from pallas_kernels.formats.block_format import BlockFormat, register

NVFP4 = register("nvfp4", BlockFormat("e2m1", 16, "e4m3", two_level=True))

"""mxfp8 and mxfp4: OCP microscaling, blocks of 32 with a power-of-two (e8m0) scale.

The default rule ``floor`` is OCP's: the largest values of a block may saturate.
``scale_rule="ceil"`` never saturates. e8m0 has no zero and NaN is 0xFF: a zero block stores scale
1, a block with NaN or inf stores NaN. Scales below 2^-126 are not used.

``mxfp4_int8`` is mxfp4 whose scales along the quantised axis (of an output of a weight) are 1, 1/2,
1/4 or 1/8 of the largest. A code times its scale is then an integer up to 6 · 2 · 8 = 96 times one
number of the output, so that such weights enter INT8 products without a rounding. Where a block of
mxfp4 would have a smaller scale, its values keep a resolution of 1/96 of the largest of the output
(INT8 with one scale an output has 1/127).
"""

from pallas_kernels.formats.block_format import BlockFormat, register

MXFP8 = register("mxfp8", BlockFormat("e4m3", 32, "e8m0"))
MXFP4 = register("mxfp4", BlockFormat("e2m1", 32, "e8m0"))
MXFP4_INT8 = register("mxfp4_int8", BlockFormat("e2m1", 32, "e8m0", scale_steps=8))

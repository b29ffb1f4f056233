"""mxfp8 and mxfp4: OCP microscaling, blocks of 32 with a power-of-two (e8m0) scale.

The default rule ``floor`` is OCP's: the largest values of a block may saturate.
``scale_rule="ceil"`` never saturates. e8m0 has no zero and NaN is 0xFF: a zero block stores scale
1, a block with NaN or inf stores NaN. Scales below 2^-126 are not used.

``mxfp4_narrow`` is mxfp4 whose scales along the quantised axis (of an output of a weight) lie
within 11 octaves. Every value is then a power of two of its output times an E4M3 number:

    6 · 2^6 <= 448   and   .5 · 2^(6 - 11) = 2^-6, the smallest normal number

so that such weights enter FP8 products without a rounding. Only blocks 2^11 times smaller than the
largest of their output are stored in another way than in mxfp4.
"""

from pallas_kernels.formats.block_format import BlockFormat, register

MXFP8 = register("mxfp8", BlockFormat("e4m3", 32, "e8m0"))
MXFP4 = register("mxfp4", BlockFormat("e2m1", 32, "e8m0"))
MXFP4_NARROW = register("mxfp4_narrow", BlockFormat("e2m1", 32, "e8m0", scale_octaves=11))

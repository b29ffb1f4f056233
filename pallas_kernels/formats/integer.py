"""int8 and int4: integers with one float32 scale per axis, or per group.

| | int8 | int4 |
|---|---|---|
| codes | -127 … 127 | -7 … 7 |
| asymmetric | -128 … 127 | -8 … 7 |
| stored bytes a value | 1 | 1, or 1/2 packed |

Zero is exact, the largest magnitude of a tile maps to the largest code, subnormals of float32 round
to zero. Integers cannot say NaN or inf, so the scale of such a tile is NaN.

``int4_int8`` is int4 in groups of 128 whose scales along the quantised axis (of an output of a
weight) are multiples of the largest over 15. A code times its scale is then an integer up to
8 · 15 = 120 times one number of the output, so that such weights enter INT8 products without a
rounding (QServe, arXiv:2405.04532, section 4.1).
"""

from pallas_kernels.formats.block_format import BlockFormat, register

INT8 = register("int8", BlockFormat("int8"))
INT4 = register("int4", BlockFormat("int4"))
INT4_INT8 = register("int4_int8", BlockFormat("int4", 128, scale_steps=15))

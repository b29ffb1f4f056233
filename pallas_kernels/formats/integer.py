"""int8 and int4: integers with one float32 scale per axis, or per group.

| | int8 | int4 |
|---|---|---|
| codes | -127 … 127 | -7 … 7 |
| asymmetric | -128 … 127 | -8 … 7 |
| stored bytes a value | 1 | 1, or 1/2 packed |

Zero is exact, the largest magnitude of a tile maps to the largest code, subnormals of float32 round
to zero. Integers cannot say NaN or inf, so the scale of such a tile is NaN.
"""

from pallas_kernels.formats.block_format import BlockFormat, register

INT8 = register("int8", BlockFormat("int8"))
INT4 = register("int4", BlockFormat("int4"))

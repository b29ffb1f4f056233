"""fp8_e4m3 and fp8_e5m2: OCP 8-bit floats with one float32 scale per axis, or per block.

| | fp8_e4m3 | fp8_e5m2 |
|---|---|---|
| largest code | 448 | 57344 |
| smallest normal / subnormal code | 2^-6 / 2^-9 | 2^-14 / 2^-16 |

A bare cast to these dtypes turns an overflow into NaN (e4m3) or inf (e5m2), so values are clipped
first. NaN and inf in the data make the scale of their tile NaN, although both types have a NaN
code: one rule for every format.
"""

from pallas_kernels.formats.block_format import BlockFormat, register

FP8_E4M3 = register("fp8_e4m3", BlockFormat("e4m3"))
FP8_E5M2 = register("fp8_e5m2", BlockFormat("e5m2"))

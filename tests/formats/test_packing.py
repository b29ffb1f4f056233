"""Two codes to a byte."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.formats import pack_codes, unpack_codes

DTYPES = (jnp.int4, jnp.uint4, jnp.float4_e2m1fn)
# Few shapes, because each one compiles; the values are what matters.
CASES = st.sampled_from([((2,), -1), ((3, 4), 1), ((4, 3), 0), ((1, 2, 3), -2)])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), CASES, st.data())
def test_unpack_undoes_pack(dtype, case, data):
    shape, axis = case
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 15)))
    x = unpack_codes(jnp.asarray(codes), dtype, axis)  # any byte pattern is a valid pair of codes
    packed = pack_codes(x, axis)
    np.testing.assert_array_equal(packed, codes)
    again = unpack_codes(packed, dtype, axis)
    assert again.dtype == dtype
    np.testing.assert_array_equal(np.asarray(again).astype(np.float32), np.asarray(x, np.float32))


def test_even_index_is_the_low_nibble():
    assert pack_codes(jnp.array([1, 2, -1, -8], jnp.int4)).tolist() == [0x21, 0x8F]
    column = pack_codes(jnp.array([[1, 2], [3, 4]], jnp.int4), axis=0)
    assert column.tolist() == [[0x31, 0x42]]


def test_e2m1_codes():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    x = jnp.float32([*values, *(-v for v in values)]).astype(jnp.float4_e2m1fn)
    assert pack_codes(x).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


def test_errors():
    with pytest.raises(ValueError, match="axis 0 has odd length 3"):
        pack_codes(jnp.zeros(3, jnp.int4))
    with pytest.raises(ValueError, match="int4, uint4 or float4_e2m1fn to be packed, got int8"):
        pack_codes(jnp.zeros(4, jnp.int8))
    with pytest.raises(ValueError, match="axis 1 is out of range for an array of 1 dimensions"):
        pack_codes(jnp.zeros(4, jnp.int4), axis=1)
    with pytest.raises(ValueError, match="packed must be uint8, got int8"):
        unpack_codes(jnp.zeros(4, jnp.int8), jnp.int4)
    with pytest.raises(ValueError, match=r"dtype must be int4.*got int8"):
        unpack_codes(jnp.zeros(4, jnp.uint8), jnp.int8)

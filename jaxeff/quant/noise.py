"""A cheap counter-based random generator for stochastic rounding."""

import functools

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import lax


def counter_key(key_data: jax.Array) -> jax.Array:
    """Makes a typed PRNG key whose bits are a hash of key and position.

    ``bits[i, j] = mix(mix(i · c₁ + k₀) ⊕ (j · c₂ + k₁))`` with a 32-bit mixer of two multiplications
    and three shifts. It costs about ten operations per element, where jax's default generator
    needs over a hundred, which would dominate an emulated FP4 step. It is meant for rounding noise:
    uniform, without correlation that a moment test finds, but neither cryptographic nor made for
    simulation. Every element depends on its position alone, so sharding changes nothing.

    Args:
      key_data: uint32 ``[2]``, such as ``jax.random.key_data`` of a default key.

    Returns:
      A typed key that ``jax.random.bits``, ``uniform``, ``split`` and ``fold_in`` accept.

    Example:
      >>> key = counter_key(jax.random.key_data(jax.random.key(0)))
      >>> bool(abs(jax.random.uniform(key, (10_000,)).mean() - 0.5) < 0.02)
      True

    References:
      C. Wellons, "Prospecting for hash functions" (2018): the mixer ``lowbias32``. J. Salmon et
      al., "Parallel random numbers: as easy as 1, 2, 3" (2011): counter-based generators.
    """
    return jax.random.wrap_key_data(key_data, impl=_implementation())


@functools.cache
def _implementation():
    return jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(_threefry(jnp.stack([seed, seed]))),
        split=lambda data, shape: jax.random.key_data(jax.random.split(_threefry(data), shape)),
        random_bits=_random_bits,
        fold_in=lambda data, value: jax.random.key_data(jax.random.fold_in(_threefry(data), value)),
        name="jaxeff_counter",
        tag="jxc",
    )


def _threefry(data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data.astype(jnp.uint32), impl="threefry2x32")


def _random_bits(key_data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    if bit_width not in (8, 16, 32):
        raise NotImplementedError(f"the counter generator serves 8, 16, 32 bits, got {bit_width}")
    if not shape:
        return _random_bits(key_data, bit_width, (1,))[0]
    rows = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        rows = rows * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, rows.shape, axis)
    columns = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    # The hash of the row is made once per row; only the last mixing runs per element.
    rows = _mix(rows * jnp.uint32(0x9E3779B9) + key_data[0])
    bits = _mix(rows ^ (columns * jnp.uint32(0x85EBCA77) + key_data[1]))
    return (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

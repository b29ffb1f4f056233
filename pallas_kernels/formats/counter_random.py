"""A cheap counter-based random generator for stochastic rounding."""

import functools
import math

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import lax


def counter_key(key_data: jax.Array) -> jax.Array:
    """Makes a typed PRNG key whose bits are a hash of key and position.

    ``bits[i, j] = mix(mix(i · c₁ + k₀) ⊕ (j · c₂ + k₁))`` with a 32-bit mixer of two products and
    three shifts. It costs about ten operations per element, where jax's default generator needs
    over a hundred, which would dominate an emulated FP4 step. It is meant for rounding noise:
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


def is_counter_key(key: jax.Array) -> bool:
    """Whether ``counter_key`` made a key, or it was split off or folded from such a one.

    Args:
      key: typed or raw PRNG key.

    Returns:
      Whether its bits are those described there.

    Example:
      >>> is_counter_key(jax.random.key(0)), is_counter_key(counter_key(jnp.zeros(2, jnp.uint32)))
      (False, True)
    """
    return key.dtype == counter_key(jnp.zeros(2, jnp.uint32)).dtype


@functools.cache
def _implementation():
    return jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: _fold_in(jnp.zeros(2, jnp.uint32), seed),
        split=_split,
        random_bits=_random_bits,
        fold_in=_fold_in,
        name="jaxeff_counter",
        tag="jxc",
    )


def _fold_in(key_data: jax.Array, value: jax.Array) -> jax.Array:
    # Each new word depends on both old ones; two rounds keep small values apart.
    value = jnp.asarray(value).astype(jnp.uint32)
    first = _mix(key_data[0] + value * jnp.uint32(0x9E3779B9) + jnp.uint32(0x6A09E667))
    second = _mix(first ^ key_data[1])
    return jnp.stack([_mix(second + key_data[0]), second])


def _split(key_data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    values = lax.iota(jnp.uint32, math.prod(shape))
    # The offset keeps the children apart from what fold_in gives for small numbers.
    children = jax.vmap(lambda value: _fold_in(key_data ^ jnp.uint32(0xA5A5A5A5), value))(values)
    return children.reshape(*shape, 2)


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

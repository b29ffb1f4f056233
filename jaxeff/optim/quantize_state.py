"""Optimiser states in 8 bits: a wrapper around any optax transformation."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.formats import QTensor, get_format
from pallas_kernels.formats.counter_random import counter_key
from pallas_kernels.formats.number_types import largest_magnitude, true_divide
from pallas_kernels.ops.quantize.api import quantize

CODECS = ("dynamic8", "fp8_e4m3", "int8")
# Fields of optax states that hold squares: never negative, and divided by.
SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col", "e_g", "e_x")
SECOND_MOMENTS += ("exp_avg_sq", "grad_sum_sq")
# States that use these names otherwise: SM3's nu and Adan's v are signed.
_SECOND_MOMENTS_OF = {
    "ScaleBySM3State": ("mu",),
    "ScaleByAdanState": ("n",),
    "ScaleBySimplifiedAdEMAMixState": ("n",),
}
# Rows shorter than this are joined: a float32 scale for fewer values would cost over 6 %.
_MIN_BLOCK = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["codec", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedState:
    """One leaf of an optimiser state in 8 bits: ``value = map(codes) · scale``.

    Args:
      codes: uint8, int8 or float8, the leaf's own shape with short trailing axes joined, and with
        zeros at the end of the last axis if no block divides it.
      scale: float32, one per block of the last axis.
      codec: ``"dynamic8"``, ``"dynamic8_unsigned"``, ``"fp8_e4m3"``, ``"fp8_e5m2"`` or ``"int8"``.
      shape: shape of the leaf.
      dtype: name of its dtype.
    """

    codes: jax.Array
    scale: jax.Array
    codec: str
    shape: tuple[int, ...]
    dtype: str

    def dequantize(self) -> jax.Array:
        """The leaf as a plain array."""
        if self.codec.startswith("dynamic8"):
            values = jnp.asarray(dynamic_map(self.codec == "dynamic8"))[
                self.codes.astype(jnp.int32)
            ]
            size = self.codes.shape[-1] // self.scale.shape[-1]
            rows = values * jnp.repeat(self.scale, size, -1)
        else:
            rows = QTensor(self.codes, self.scale, qtype=self.codec).dequantize()
        return rows[..., : _row_shape(self.shape)[-1]].reshape(self.shape).astype(self.dtype)


class QuantizeStateState(NamedTuple):
    """State of ``quantize_state``: coded inner state, key words uint32 ``[2]``, update count."""

    inner: Any
    key_data: jax.Array
    count: jax.Array


def quantize_state(
    inner: optax.GradientTransformation,
    codec: Literal["dynamic8", "fp8_e4m3", "int8"] = "dynamic8",
    *,
    block: int = 256,
    stochastic: bool = True,
    min_size: int = 4096,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the large leaves of an optimiser state in 8 bits, with a scale per block.

    In each update a leaf is decoded to float32, the inner transformation runs, and the new leaf is
    coded: for a block ``b`` with scale :math:`s = \max|b| / c_{max}`, each value becomes a
    neighbouring code of :math:`b / s`, drawn so that the mean is exact (``stochastic``) or the
    nearest. Bytes: a quarter of float32 plus ``4 / block`` per value.

    =============  =====================================  =======================================
    codec          leaves in general                      second moments (``SECOND_MOMENTS``)
    =============  =====================================  =======================================
    ``dynamic8``   signed dynamic map, 7 decades          unsigned dynamic map
    ``fp8_e4m3``   E4M3                                   E5M2, for its range
    ``int8``       linear, 255 values                     unsigned dynamic map: a linear one sends
                                                          small squares to 0 and training explodes
    =============  =====================================  =======================================

    A positive second moment never becomes 0, whatever the noise: it would be divided by. It is
    raised to the smallest code of its block, which makes that update smaller, not larger.

    Blocks run along the last axis, so the codes have the shape (and the ``NamedSharding``) of their
    leaf, and the random numbers do not depend on the number of devices. Goes inside ``MultiSteps``,
    whose accumulated gradients should stay exact.

    Args:
      inner: any optax transformation.
      codec: one of the table.
      block: values per scale, at most; the largest divisor of the last axis is taken.
      stochastic: whether codes are drawn without bias, or the nearest is taken: increments far
        below the spacing of the codes, as those of a decaying second moment, are then lost.
      min_size: leaves with fewer values stay as they are.
      seed: seed of the rounding; update count and leaf are folded in.

    Returns:
      An optax transformation.

    Raises:
      ValueError: for an unknown codec, or a block or size out of range.

    Example:
      >>> adam = quantize_state(optax.adam(1e-3), "dynamic8", min_size=256)
      >>> state = adam.init({"w": jnp.ones((16, 256))})
      >>> plain = optax.adam(1e-3).init({"w": jnp.ones((16, 256))})
      >>> state_bytes(state.inner) / state_bytes(plain) < 0.27
      True

    References:
      Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv:2110.02861, section 2
      (``dynamic8``); Fishman et al., arXiv:2409.12517, section 5 (moments in E4M3 and E5M2).
    """
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
    if block < _MIN_BLOCK:
        raise ValueError(f"block must be at least {_MIN_BLOCK}, got {block}")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    inner = optax.with_extra_args_support(inner)

    def encode(tree, key, params):
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        squares = _second_moments(tree, params)
        coded = []
        for index, (path, leaf) in enumerate(leaves):
            if _is_large(leaf, min_size):
                drawn = jax.random.fold_in(key, index) if stochastic else None
                leaf = _encode(leaf, codec, path in squares, block, drawn)
            coded.append(leaf)
        return jax.tree.unflatten(structure, coded)

    def init(params):
        key_data = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
        state = encode(inner.init(params), counter_key(key_data), params)
        return QuantizeStateState(state, key_data, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        like = updates
        updates, new = inner.update(updates, _decode(state.inner), params, **extra_args)
        count = state.count + 1
        key = jax.random.fold_in(counter_key(state.key_data), count)
        return updates, QuantizeStateState(encode(new, key, like), state.key_data, count)

    return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of an optimiser state.

    Args:
      state: any pytree of arrays.

    Returns:
      Bytes.

    Example:
      >>> state_bytes({"m": jnp.ones((2, 3), jnp.bfloat16)})
      12
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit map, ascending: seven decades, finer near 1.

    Decade ``i`` from the top holds half as many values as the one above it, at the centres of equal
    intervals of (0.1, 1); 0 and 1 are added.

    Args:
      signed: whether negative values share the codes.

    Returns:
      float32 ``[256]`` in [-1, 1] or [0, 1].

    Example:
      >>> values = dynamic_map(True)
      >>> len(set(values.tolist())), float(values[0]).__round__(4), float(values[-1])
      (256, -0.993, 1.0)

    References:
      Dettmers et al., arXiv:2110.02861, section 1.3 and figure 2.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        centres = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*centres, *-centres] if signed else [*centres]
    return np.sort(np.float32(values))


def _is_large(leaf: Any, min_size: int) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0 and leaf.size >= min_size


def _second_moments(state: Any, params: Any) -> set[tuple]:
    """Paths of the leaves that hold squares, by the names of a state's fields.

    The end of a path is the way to a parameter, which may well be called "v".
    """

    def is_special(node):
        return type(node).__name__ in _SECOND_MOMENTS_OF

    flatten = jax.tree_util.tree_flatten_with_path
    own = {path for path, _ in flatten(params)[0]}
    special = {
        path: _SECOND_MOMENTS_OF[type(node).__name__]
        for path, node in flatten(state, is_leaf=is_special)[0]
        if is_special(node)
    }

    def is_square(path):
        for index, key in enumerate(path):
            if path[index:] in own:
                return False
            fields = special.get(path[:index], SECOND_MOMENTS)
            if isinstance(key, jax.tree_util.GetAttrKey) and key.name in fields:
                return True
        return False

    return {path for path, _ in flatten(state)[0] if is_square(path)}


def _decode(tree: Any) -> Any:
    def plain(leaf):
        return leaf.dequantize() if isinstance(leaf, QuantizedState) else leaf

    return jax.tree.map(plain, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedState))


def _encode(leaf, codec: str, squares: bool, block: int, key) -> QuantizedState:
    if squares:
        codec = "fp8_e5m2" if codec == "fp8_e4m3" else "dynamic8_unsigned"
    rows = leaf.astype(jnp.float32).reshape(_row_shape(leaf.shape))
    tile = _tile(rows.shape[-1], block)
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % tile)])
    blocks = rows.reshape(*rows.shape[:-1], -1, tile)
    amax = largest_magnitude(blocks, -1)  # [..., blocks]
    if codec == "dynamic8":
        # The signed map ends at 1 but begins at -0.993: a block must not be cut off there.
        amax = jnp.maximum(amax, blocks.min(-1) / dynamic_map(True)[0])
    if squares:
        smallest = jnp.repeat(amax, tile, -1) * _smallest(codec)
        rows = jnp.where(rows > 0, jnp.maximum(rows, smallest), rows)
    if codec.startswith("dynamic8"):
        codes, scale = _dynamic(rows, amax, tile, codec == "dynamic8", key)
    else:
        rounding = "nearest" if key is None else "stochastic"
        coded = quantize(rows, codec, axis=-1, tile=tile, rounding=rounding, key=key)
        codes, scale = coded.qvalue, coded.scale
    return QuantizedState(codes, scale, codec, leaf.shape, str(leaf.dtype))


def _dynamic(rows, amax, tile: int, signed: bool, key):
    values = jnp.asarray(dynamic_map(signed))
    scale = jnp.where(amax > 0, amax, 1.0)
    units = true_divide(rows, jnp.repeat(scale, tile, -1))
    below = jnp.clip(jnp.searchsorted(values, units, side="right") - 1, 0, 254)
    low, high = values[below], values[below + 1]
    share = (units - low) / (high - low)
    up = share > (0.5 if key is None else jax.random.uniform(key, units.shape, jnp.float32))
    # A NaN must not become a number: it has no code, so the scale of its block carries it.
    return (below + up).astype(jnp.uint8), jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def _smallest(codec: str) -> float:
    """Smallest positive code over the largest, a little above so that it rounds to itself."""
    if codec.startswith("dynamic8"):
        return float(dynamic_map(codec == "dynamic8")[1]) * (1 + 1e-6)
    element = get_format(codec).element_type
    return element.smallest / element.max * (1 + 1e-6)


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Joins trailing axes until a row has ``_MIN_BLOCK`` values."""
    shape = list(shape)
    while len(shape) > 1 and shape[-1] < _MIN_BLOCK:
        last = shape.pop()
        shape[-1] *= last
    return tuple(shape)


def _tile(length: int, block: int) -> int:
    """Largest divisor of ``length`` that is at most ``block``, unless that is too small."""
    if length <= block:
        return length
    divisor = next(size for size in range(block, 0, -1) if length % size == 0)
    return divisor if divisor >= _MIN_BLOCK else block

"""One flow block: a causal transformer that gives every token an affine map of its predecessors."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.starflow.config import TARFlowConfig
from jaxeff.nn.norm import RMSNorm
from jaxeff.typing import Array, AttentionFn, DTypeLike

__all__ = ["FlowBlock", "TokenMap", "rope_angles", "rope_positions", "rotate"]

# softplus(x + _SOFTPLUS_SHIFT) is 1 at x = 0, so that a zero output is the identity map.
_SOFTPLUS_SHIFT = math.log(math.e - 1)
_ROPE_BASE = 10000.0


def rope_positions(
    grid: tuple[int, int], length: float, prefix: int = 0, *, prefix_axis: bool | None = None
) -> np.ndarray:
    """Row, column (and prefix index) of every token of a block's sequence.

    Image token: ``(row, col, 0) · length / √(h·w)``; prefix token ``j``: ``(0, 0, j·length / S)``.
    Doubling the resolution at the same ``length`` therefore halves the spacing.

    Args:
      grid: ``(h, w)`` tokens per column and row.
      length: tokens per side at which the spacing is 1.
      prefix: prefix tokens ``S`` in front of the image.
      prefix_axis: give the third coordinate; by default exactly when there is a prefix.

    Returns:
      float64 ``[S + h·w, 2 or 3]``.

    >>> rope_positions((2, 2), 2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]

    References: STARFlow (arXiv 2506.06276) §3.3; ``get_positions`` of apple/ml-starflow.
    """
    height, width = grid
    if min(height, width) < 1:
        raise ValueError(f"grid must be at least (1, 1), got {grid}")
    step = length / math.sqrt(height * width)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows.ravel() * step, columns.ravel() * step], -1)
    if prefix_axis is None:
        prefix_axis = prefix > 0
    if not prefix_axis:
        if prefix:
            raise ValueError(f"prefix must be 0 without prefix_axis, got {prefix}")
        return image
    image = np.pad(image, ((0, 0), (0, 1)))
    text = np.zeros((prefix, 3))
    text[:, 2] = np.arange(prefix) * length / max(prefix, 1)
    return np.concatenate([text, image])


def rope_angles(positions: np.ndarray, head_dim: int, text_angles: int = 8) -> np.ndarray:
    """Rotation angles of every token, one per pair of head dimensions.

    With two coordinates half of the ``H/2`` angles belong to the row and half to the column, each
    with frequencies ``10000^(−i/m)`` for ``i < m``. With three, ``text_angles`` of them belong to
    the third coordinate and the rest is shared by row and column; with one, all belong to it.

    Args:
      positions: ``[T, 1, 2 or 3]`` coordinates.
      head_dim: head dimensions ``H``, even.
      text_angles: angles kept for the third coordinate.

    Returns:
      float32 ``[T, H/2]`` in radians.

    >>> rope_angles(rope_positions((8, 8), 8, 1), 64).shape
    (65, 32)
    """
    axes = positions.shape[-1]
    half = head_dim // 2
    shares = {1: (half,), 2: (half // 2,) * 2}
    shares[3] = ((half - text_angles) // 2,) * 2 + (text_angles,)
    if axes not in shares:
        raise ValueError(f"positions must have 1, 2 or 3 coordinates, got {axes}")
    parts = [
        positions[:, axis, None] * _ROPE_BASE ** (-np.arange(count) / count)
        for axis, count in enumerate(shares[axes])
    ]
    return np.concatenate(parts, -1).astype(np.float32)


def rotate(x: Array, angles: Array, pairs: str = "interleaved") -> Array:
    """Rotate pairs of head dimensions, in float32, and return the dtype of ``x``.

    ``(a, b) → (a cos θ − b sin θ, a sin θ + b cos θ)`` for the pairs ``(2i, 2i+1)``
    (``"interleaved"``) or ``(i, i + H/2)`` (``"half"``).

    Args:
      x: queries or keys ``[..., T, N, H]``.
      angles: ``[T, H/2]`` in radians.
      pairs: which dimensions form a pair.

    Returns:
      rotated ``x``.

    >>> rotate(jnp.ones((1, 1, 2)), jnp.full((1, 1), jnp.pi / 2)).round(3).tolist()
    [[[-1.0, 1.0]]]
    """
    wide = x.astype(jnp.float32)
    shape = wide.shape
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # [T, 1, H/2]
    if pairs == "interleaved":
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, -1)
    out = (first * cos - second * sin, first * sin + second * cos)
    joined = (
        jnp.stack(out, -1).reshape(shape) if pairs == "interleaved" else jnp.concatenate(out, -1)
    )
    return joined.astype(x.dtype)


class TokenMap(NamedTuple):
    """The affine map of tokens: ``z = (x − mu) / sigma``, both float32 ``[B, T, D]``."""

    mu: Array
    log_sigma: Array

    @property
    def sigma(self) -> Array:
        """Scale of the map, above 0."""
        return jnp.exp(self.log_sigma)


class FlowAttention(nnx.Module):
    """Causal self-attention with one query-key-value projection, with or without a cache."""

    def __init__(self, config: TARFlowConfig, deep: bool, linear, rngs: nnx.Rngs):
        width = config.block_width(deep)
        self.num_heads, self.num_kv_heads = config.block_heads(deep)
        self.head_dim, self.pairs = config.head_dim, config.rope_pairs
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.norm = _norm(config, width, rngs)
        self.qkv = linear(width, queries + 2 * keys, use_bias=config.use_bias, rngs=rngs)
        self.proj = linear(queries, width, use_bias=config.use_bias, rngs=rngs)
        head_norm = partial(RMSNorm, self.head_dim, scale_plus_one=True)
        self.query_norm = head_norm() if config.qk_norm else None
        self.key_norm = head_norm() if config.qk_norm else None
        self.post_norm = RMSNorm(width, scale_plus_one=True) if config.post_norm else None

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, before rotation."""
        batch, length, _ = x.shape
        both = self.num_heads + self.num_kv_heads
        joint = self.qkv(self.norm(x)).reshape(batch, length, -1, self.head_dim)
        q, k, v = jnp.split(joint, (self.num_heads, both), axis=2)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def merge(self, out: Array) -> Array:
        """Project attention's ``[B, T, N, H]`` back to ``[B, T, width]``."""
        out = self.proj(out.reshape(*out.shape[:2], -1))
        return out if self.post_norm is None else self.post_norm(out)

    def __call__(self, x: Array, angles, cached, attention_fn: AttentionFn, cooling):
        """Attend ``x [B, T, width]``; return the output and the updated layer cache.

        ``cached`` is None or ``(layer, positions [T], all_angles)``; ``cooling [B, 1, 1, 1]`` is
        one over the attention temperature, multiplied onto the queries.
        """
        q, k, v = self.project(x)
        if cooling is not None:
            q = (q * cooling).astype(q.dtype)
        if cached is None:
            if angles is not None:
                q, k = rotate(q, angles, self.pairs), rotate(k, angles, self.pairs)
            return self.merge(attention_fn(q, k, v, is_causal=True)), None
        layer, positions, table = cached
        before_rotation = getattr(layer, "keys_before_rotation", False)
        if angles is not None:
            q = rotate(q, angles, self.pairs)
            k = k if before_rotation else rotate(k, angles, self.pairs)
        where = jnp.broadcast_to(positions, x.shape[:2])  # [B, T]
        layer = layer.update(k, v, positions=where, valid=None, queries=q)
        keys, values = layer.read(q.dtype)  # [B, S, K, H]
        if before_rotation and table is not None:
            keys = rotate(keys, layer.slot_angles(table), self.pairs)
        mask = layer.mask(where, None)  # [B or 1, K or 1, T, S]
        if mask.shape[1] > 1:
            mask = jnp.repeat(mask, self.num_heads // self.num_kv_heads, axis=1)
        return self.merge(attention_fn(q, keys, values, mask=mask)), layer


class FlowMLP(nnx.Module):
    """Pre-norm MLP with exact GELU, or gated by tanh-approximated GELU."""

    def __init__(self, config: TARFlowConfig, deep: bool, linear, rngs: nnx.Rngs):
        width = config.block_width(deep)
        hidden = int(width * config.expansion)
        self.norm = _norm(config, width, rngs)
        self.up = linear(width, hidden, use_bias=config.use_bias, rngs=rngs)
        gated = config.mlp == "geglu"
        self.gate = linear(width, hidden, use_bias=config.use_bias, rngs=rngs) if gated else None
        self.down = linear(hidden, width, use_bias=config.use_bias, rngs=rngs)
        self.post_norm = RMSNorm(width, scale_plus_one=True) if config.post_norm else None

    def __call__(self, x: Array) -> Array:
        """Map ``[B, T, width]`` to itself."""
        x = self.norm(x)
        if self.gate is None:
            hidden = jax.nn.gelu(self.up(x), approximate=False)
        else:
            hidden = jax.nn.gelu(self.gate(x), approximate=True) * self.up(x)
        out = self.down(hidden)
        return out if self.post_norm is None else self.post_norm(out)


class FlowLayer(nnx.Module):
    """One pre-norm transformer layer: attention, then MLP, each added to the stream."""

    def __init__(self, config: TARFlowConfig, deep: bool, linear, rngs: nnx.Rngs):
        self.attention = FlowAttention(config, deep, linear, rngs)
        self.mlp = FlowMLP(config, deep, linear, rngs)

    def __call__(self, h: Array, angles, cached, attention_fn: AttentionFn, cooling):
        """Map ``h [B, T, width]``; return it and the updated layer cache."""
        out, layer = self.attention(h, angles, cached, attention_fn, cooling)
        h = h + out
        return h + self.mlp(h), layer


class FlowBlock(nnx.Module):
    """One block of the flow over tokens ``[B, N, D]`` in its own order.

    ``z_i = (x_i − μ_i(x_<i)) / σ_i(x_<i)``; the block does not permute, the flow does.

    Args:
      config: the flow's configuration.
      index: number of the block, data side first; the last one is the deep block.
      rngs: streams of the initial weights.
      dtype: dtype of the transformer's arithmetic; μ, σ and the tokens stay float32.
      param_dtype: dtype of the stored weights.
    """

    def __init__(
        self,
        config: TARFlowConfig,
        index: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        deep = index == config.num_blocks - 1
        width, token = config.block_width(deep), config.token_dim
        self.config, self.index, self.deep = config, index, deep
        self.dtype = dtype
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, kernel_init=_fan_in)
        outputs = token if config.volume_preserving else 2 * token
        self.proj_in = linear(token, width, rngs=rngs)
        # Zero kernel, random bias: the first map is a constant affine one (both papers' code).
        bias = partial(_uniform, bound=width**-0.5)
        self.proj_out = nnx.Linear(
            width,
            outputs,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.zeros,
            bias_init=bias,
            rngs=rngs,
        )
        draw = lambda *shape: jax.random.normal(rngs.params(), shape, param_dtype)  # noqa: E731
        self.sos = nnx.Param(draw(token)) if config.sos else None
        self.pos_embed = None if config.rope else nnx.Param(0.01 * draw(config.num_tokens, width))
        added = config.cond == "class_add"
        self.class_embed = nnx.Param(0.01 * draw(config.num_classes, width)) if added else None
        self.has_prefix = config.block_has_prefix(index)
        self.proj_prefix = linear(config.prefix_dim, width, rngs=rngs) if self.has_prefix else None
        self.layers = nnx.List(
            FlowLayer(config, deep, linear, rngs) for _ in range(config.layers_per_block[index])
        )
        self.final_norm = RMSNorm(width, scale_plus_one=True) if config.final_norm else None

    @property
    def prefix_len(self) -> int:
        """Prefix tokens in front of this block's sequence."""
        return self.config.prefix_len if self.has_prefix else 0

    @property
    def shift(self) -> int:
        """1 where slot ``s`` gives the map of token ``s + 1``, 0 where it gives that of ``s``."""
        return 0 if self.config.sos else 1

    def angles(self, grid: tuple[int, int], prefix: int) -> np.ndarray | None:
        """Rotary angles ``[S + N, H/2]`` in sequence order, None with learned positions."""
        if not self.config.rope:
            return None
        length = self.config.rope_length or self.config.grid[0]
        text = self.config.rope_text_angles
        # A block without prefix in a model that has one keeps the three-part split of the angles.
        positions = rope_positions(grid, length, prefix, prefix_axis=text > 0)
        return rope_angles(positions, self.config.head_dim, text)

    def position_table(self, flipped: bool) -> Array | None:
        """Learned positions ``[N, width]`` in sequence order: tied to space, so flipped too."""
        if self.pos_embed is None:
            return None
        table = self.pos_embed[...]
        return table[::-1] if flipped else table

    def class_vector(self, label: Array | None, batch: int) -> Array | None:
        """Class vector ``[B, 1, width]``; −1 (or no label) gives the mean of the classes."""
        if self.class_embed is None:
            return None
        table = self.class_embed[...]
        mean = table.mean(0)
        if label is None:
            return jnp.broadcast_to(mean, (batch, 1, mean.shape[0]))
        # Clipped because −1 would read the last class; its row is replaced just below.
        known = table[jnp.clip(label, 0, table.shape[0] - 1)]
        return jnp.where((label < 0)[:, None], mean, known)[:, None]

    def embed_prefix(self, prefix: Array) -> Array:
        """Prefix tokens ``[B, S, E]`` in the width of the block."""
        return self.proj_prefix(prefix.astype(self.dtype))

    def embed(self, tokens: Array, positions: Array | None, vector: Array | None) -> Array:
        """Input tokens ``[B, T, D]`` in the width of the block, with position and class."""
        h = self.proj_in(tokens.astype(self.dtype))
        if positions is not None:
            h = h + positions.astype(self.dtype)
        return h if vector is None else h + vector.astype(self.dtype)

    def run(self, h, angles, caches, attention_fn, cooling=None) -> tuple[Array, Any]:
        """All layers over ``h [B, T, width]``; ``caches`` is None or (layers, positions, table)."""
        if caches is None:
            return self._run_parallel(h, angles, attention_fn, cooling), ()
        layers = []
        for index, layer in enumerate(self.layers):
            cached = (caches[0][index], *caches[1:])
            h, new = layer(h, angles, cached, attention_fn, cooling)
            layers.append(new)
        return h, tuple(layers)

    def _run_parallel(self, h, angles, attention_fn, cooling) -> Array:
        """All layers without a cache, as one scan: a deep block compiles as fast as a shallow one.

        With a cache the layers are unrolled: a scan would copy every layer's cache at every token.
        """
        graphdefs, states = zip(*(nnx.split(layer) for layer in self.layers), strict=True)
        if len(set(graphdefs)) > 1:  # layers that a quantisation rule made different
            for layer in self.layers:
                h, _ = layer(h, angles, None, attention_fn, cooling)
            return h
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

        def step(h, state):
            layer = nnx.merge(graphdefs[0], state)
            return layer(h, angles, None, attention_fn, cooling)[0], None

        return jax.lax.scan(step, h, stacked)[0]

    def read_out(self, h: Array) -> TokenMap:
        """The affine maps that the hidden states ``[B, T, width]`` give, in float32."""
        if self.final_norm is not None:
            h = self.final_norm(h)
        return self.token_map(self.proj_out(h).astype(jnp.float32))

    def token_map(self, raw: Array) -> TokenMap:
        """``(μ, log σ)`` from raw outputs ``[B, T, 2D]`` ordered (scale, shift)."""
        config = self.config
        if config.soft_clip:
            raw = config.soft_clip * jnp.tanh(raw / config.soft_clip)
        if config.volume_preserving:
            return TokenMap(raw, jnp.zeros_like(raw))
        scale, shift = jnp.split(raw, 2, -1)
        if config.scale == "exp":
            return TokenMap(shift, scale)
        return TokenMap(shift, _log_softplus(scale + _SOFTPLUS_SHIFT))

    def maps(
        self, x: Array, label, prefix, grid, flipped: bool, attention_fn, cooling=None
    ) -> TokenMap:
        """The maps of all tokens ``x [B, N, D]`` (sequence order) in one parallel pass."""
        batch = x.shape[0]
        inputs = x
        if self.config.sos:
            first = jnp.broadcast_to(self.sos[...], (batch, 1, x.shape[-1])).astype(x.dtype)
            inputs = jnp.concatenate([first, x[:, :-1]], 1)
        h = self.embed(inputs, self.position_table(flipped), self.class_vector(label, batch))
        skip = self.prefix_len
        if skip:
            h = jnp.concatenate([self.embed_prefix(prefix), h], 1)
        h, _ = self.run(h, self.angles(grid, skip), None, attention_fn, cooling)
        maps = self.read_out(h[:, skip:])
        return maps if self.config.sos else TokenMap(*map(_shift_right, maps))


def _log_softplus(x: Array) -> Array:
    # log(log(1 + e^x)) = x − e^x/2 + … far below zero, where softplus itself rounds to 0.
    low = x < -12.0
    exact = jnp.log(jax.nn.softplus(jnp.where(low, 0.0, x)))
    return jnp.where(low, x - 0.5 * jnp.exp(jnp.minimum(x, -12.0)), exact)


def _shift_right(values: Array) -> Array:
    # Token i uses the output at i − 1. Zero raw output is μ = 0 and log σ = 0 in both scales.
    return jnp.concatenate([jnp.zeros_like(values[:, :1]), values[:, :-1]], 1)


def _uniform(key, shape, dtype=jnp.float32, *, bound: float):
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _fan_in(key, shape, dtype=jnp.float32, **_):
    # Unit gain: √3 times torch's default, which trained more slowly on digits.
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


def _norm(config: TARFlowConfig, width: int, rngs: nnx.Rngs):
    if config.norm == "rms":
        return RMSNorm(width, scale_plus_one=True)
    # Two-pass variance: the fast one loses digits that a likelihood needs.
    return nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

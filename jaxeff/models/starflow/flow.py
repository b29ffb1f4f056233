"""TARFlow and STARFlow: a stack of autoregressive blocks with exact likelihood and inverse."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.starflow.block import FlowBlock
from jaxeff.models.starflow.config import TARFlowConfig
from jaxeff.typing import Array, AttentionFn, DTypeLike

__all__ = [
    "Condition",
    "FlowTrace",
    "PriorVariance",
    "TARFlow",
    "bits_per_dim",
    "denoise",
    "ema_update",
    "flow_loss",
    "patchify",
    "unpatchify",
    "with_dtype",
]


class PriorVariance(nnx.Variable):
    """Running prior variance per token value; not trained by gradients (TARFlow's VP variant)."""


class Condition(NamedTuple):
    """A condition as the blocks read it: int label ``[B]`` or prefix ``[B, S, E]``, or neither."""

    label: Array | None = None
    prefix: Array | None = None


class FlowTrace(NamedTuple):
    """All that one pass data → noise produces.

    Attributes:
      z: noise, in the form of the input.
      logdet: float32 ``[B]``, log-determinant per dimension (the mean over N and D).
      inputs: tokens ``[B, N, D]`` entering each block, in image order.
      outputs: tokens leaving each block, in image order.
      log_sigmas: ``log σ`` ``[B, N, D]`` of each block, in the block's own order.
    """

    z: Array
    logdet: Array
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    log_sigmas: tuple[Array, ...]


def patchify(x: Array, patch_size: int, patch_order: str = "c_p_p") -> Array:
    """Cut images into tokens.

    Args:
      x: images ``[B, H, W, C]``.
      patch_size: side ``P`` in pixels; must divide H and W.
      patch_order: ``"c_p_p"`` orders a token as (channel, row, column), ``"p_p_c"`` as
        (row, column, channel).

    Returns:
      tokens ``[B, (H/P)·(W/P), C·P²]`` in raster order.

    >>> patchify(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).tolist()
    [[[0.0, 1.0, 2.0, 3.0]]]
    """
    batch, height, width, channels = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"x must have height and width divisible by patch_size ({patch_size}), "
            f"got {height} and {width}"
        )
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    axes = (0, 1, 3, 5, 2, 4) if patch_order == "c_p_p" else (0, 1, 3, 2, 4, 5)
    return x.transpose(axes).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(
    tokens: Array, grid: tuple[int, int], patch_size: int, patch_order: str = "c_p_p"
) -> Array:
    """Put tokens ``[B, h·w, C·P²]`` back into images ``[B, h·P, w·P, C]``; undoes `patchify`.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> bool((unpatchify(patchify(x, 2), (2, 2), 2) == x).all())
    True
    """
    batch, count, size = tokens.shape
    rows, columns = grid
    channels = size // patch_size**2
    if count != rows * columns or channels * patch_size**2 != size:
        raise ValueError(
            f"tokens must be [B, {rows * columns}, a multiple of {patch_size**2}], "
            f"got {tokens.shape}"
        )
    if patch_order == "c_p_p":
        x = tokens.reshape(batch, rows, columns, channels, patch_size, patch_size)
        x = x.transpose(0, 1, 4, 2, 5, 3)
    else:
        x = tokens.reshape(batch, rows, columns, patch_size, patch_size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch_size, columns * patch_size, channels)


class TARFlow(nnx.Module):
    """A normalizing flow of autoregressive transformer blocks (TARFlow or STARFlow by config).

    ``z, logdet, inter = flow(x, cond)``; ``x = flow.inverse(z, cond)``. Tokens, μ, σ and
    log-determinants are float32 whatever the dtype of the transformer.

    Args:
      config: sizes and conventions.
      rngs: stream ``params`` of the initial weights.
      dtype: dtype of the transformer's arithmetic (bfloat16 halves training time and memory).
      param_dtype: dtype of the stored weights.
      attention_fn: a callable with the signature of ``jax.nn.dot_product_attention``, which is the
        default; ``functools.partial(pallas_kernels.dot_product_attention, quant="sage2")`` samples
        through quantised attention.
      precision: matmul precision of the transformer. TF32, the default of GPUs, would break the
        inverse's 1e-5; None takes jax's setting.

    Raises:
      ValueError: from calls whose inputs do not fit the configuration, naming both shapes.

    Example:
      >>> config = TARFlowConfig(1, 4, 2, 16, (1, 1), head_dim=8)
      >>> flow = TARFlow(config, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
      >>> z, logdet, inter = flow(x)
      >>> z.shape, logdet.shape, len(inter)
      ((3, 4, 4, 1), (3,), 2)
      >>> bool(jnp.abs(flow.inverse(z) - x).max() < 1e-5)
      True

    References: TARFlow (arXiv 2412.06329) §3; STARFlow (arXiv 2506.06276) §3.
    """

    def __init__(
        self,
        config: TARFlowConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        attention_fn: AttentionFn = jax.nn.dot_product_attention,
        precision: str | None = "highest",
    ):
        self.config = config
        self.attention_fn = attention_fn
        self.precision = precision
        # A block of no layers is the identity and has no weights.
        self.blocks = nnx.List(
            FlowBlock(config, index, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
            if layers
            else None
            for index, layers in enumerate(config.layers_per_block)
        )
        # Tied to places of the training image, as learned positions are; resolution-free models
        # (rotary positions) have none.
        shape = (config.num_tokens, config.token_dim)
        self.prior_var = None if config.rope else PriorVariance(jnp.ones(shape))

    def __call__(self, x: Array, cond=None) -> tuple[Array, Array, tuple[Array, ...]]:
        """Map data to noise.

        Args:
          x: images ``[B, H, W, C]`` or tokens ``[B, N, D]`` of a square grid, float.
          cond: int labels ``[B]`` (−1 = null), prefix tokens ``[B, S, E]``, or None.

        Returns:
          ``(z, logdet, inter)``: noise in the form of ``x``, log-determinant per dimension ``[B]``
          and the tokens that enter each block.
        """
        trace = self.encode(x, cond)
        return trace.z, trace.logdet, trace.inputs

    def encode(self, x: Array, cond=None) -> FlowTrace:
        """Map data to noise and keep every intermediate; see `FlowTrace`."""
        condition = self.condition(cond, x.shape[0])
        return _encode(*nnx.split(self), x, condition)

    def _push(self, index: int, tokens: Array, condition: Condition, grid):
        flipped = self.config.reversed_blocks[index]
        x = tokens[:, ::-1] if flipped else tokens
        with _precision(self.precision):
            maps = self.blocks[index].maps(x, *condition, grid, flipped, self.attention_fn)
        z = (x - maps.mu) * jnp.exp(-maps.log_sigma)
        return (z[:, ::-1] if flipped else z), maps.log_sigma

    def inverse(self, z: Array, cond=None, **options):
        """Map noise to data, exactly; see `jaxeff.models.starflow.sampling.inverse`."""
        from jaxeff.models.starflow.sampling import inverse

        return inverse(self, z, cond, **options)

    def sample(self, key: Array, cond=None, **options):
        """Draw samples; see `jaxeff.models.starflow.sampling.sample`."""
        from jaxeff.models.starflow.sampling import sample

        return sample(self, key, cond, **options)

    def nll(self, x: Array, cond=None) -> Array:
        """Training objective per sample: ``½·mean(z²) − logdet``, float32 ``[B]``, nats per dim.

        Without the constant ½·ln 2π and with a unit prior, as in both papers' code.
        """
        z, logdet, _ = self(x, cond)
        return 0.5 * jnp.mean(jnp.square(z), range(1, z.ndim)) + logdet * -1.0

    def log_prob(self, x: Array, cond=None) -> Array:
        """Log density of each sample in nats, ``Σ log N(z; 0, var) + N·D·logdet``.

        Args:
          x: data, as in ``__call__``.
          cond: condition, as in ``__call__``.

        Returns:
          float32 ``[B]``.

        >>> config = TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8, volume_preserving=True)
        >>> flow = TARFlow(config, rngs=nnx.Rngs(0))
        >>> flow.log_prob(jnp.zeros((2, 4, 4, 1))).shape
        (2,)
        """
        trace = self.encode(x, cond)
        z = trace.outputs[-1]
        var = jnp.ones(()) if self.prior_var is None else self.prior_var[...]
        terms = -0.5 * (jnp.square(z) / var + jnp.log(2 * math.pi * var))
        size = z.shape[1] * z.shape[2]
        return terms.sum((1, 2)) + size * trace.logdet

    def update_prior(self, z: Array, rate: float = 0.1) -> None:
        """Move the prior variance towards the batch's: ``var ← var + rate·(mean_b z² − var)``.

        Args:
          z: noise ``[B, N, D]`` or ``[B, H, W, C]`` of a training batch.
          rate: step of the moving average, in [0, 1].
        """
        if self.prior_var is None:
            raise ValueError("update_prior needs learned positions; this flow has rotary ones")
        tokens, _ = self.to_tokens(z)
        var = self.prior_var[...]
        self.prior_var[...] = var + rate * (jnp.square(tokens).mean(0) - var)

    def to_tokens(self, x: Array) -> tuple[Array, tuple[int, int]]:
        """Tokens ``[B, N, D]`` in float32 and their grid, from images or tokens."""
        config = self.config
        if x.ndim == 4:
            if x.shape[-1] != config.in_channels:
                raise ValueError(
                    f"x must have {config.in_channels} channels last, got shape {x.shape}"
                )
            grid = (x.shape[1] // config.patch_size, x.shape[2] // config.patch_size)
            tokens = patchify(x, config.patch_size, config.patch_order)
        elif x.ndim == 3 and x.shape[-1] == config.token_dim:
            tokens, side = x, math.isqrt(x.shape[1])
            grid = config.grid if x.shape[1] == config.num_tokens else (side, side)
            if grid[0] * grid[1] != x.shape[1]:
                raise ValueError(
                    f"tokens must form a square grid, got {x.shape[1]} of them; pass an image "
                    "[B, H, W, C] for other shapes"
                )
        else:
            raise ValueError(
                f"x must be [B, H, W, {config.in_channels}] or [B, N, {config.token_dim}], "
                f"got shape {x.shape}"
            )
        if not config.rope and grid != config.grid:
            raise ValueError(
                f"x must have {config.grid} tokens, because positions are learned, got {grid}"
            )
        return tokens.astype(jnp.float32), grid

    def from_tokens(self, tokens: Array, grid: tuple[int, int]) -> Array:
        """Images ``[B, H, W, C]`` from tokens ``[B, N, D]``."""
        return unpatchify(tokens, grid, self.config.patch_size, self.config.patch_order)

    def condition(self, cond, batch: int) -> Condition:
        """Check a condition and bring it into the form that the blocks read."""
        config = self.config
        if config.cond == "none":
            if cond is not None:
                raise ValueError('cond must be None for a flow with cond="none"')
            return Condition()
        if cond is None:
            if config.cond == "class_add":
                return Condition()
            if not config.num_classes:
                raise ValueError(
                    f"cond must be prefix tokens [B, {config.prefix_len}, {config.prefix_dim}], "
                    "got None"
                )
            cond = jnp.full(batch, -1)
        cond = jnp.asarray(cond)
        if jnp.issubdtype(cond.dtype, jnp.integer):
            return self._labels(cond, batch)
        expected = (batch, config.prefix_len, config.prefix_dim)
        if config.cond == "class_add" or cond.shape != expected:
            wanted = f"int labels [{batch}]" if config.num_classes else ""
            wanted += " or " if wanted and config.cond != "class_add" else ""
            wanted += f"prefix tokens {expected}" if config.cond != "class_add" else ""
            raise ValueError(f"cond must be {wanted}, got {cond.dtype} {cond.shape}")
        return Condition(prefix=cond)

    def _labels(self, labels: Array, batch: int) -> Condition:
        classes = self.config.num_classes
        if not classes or labels.shape != (batch,):
            raise ValueError(
                f"cond must be int labels [{batch}] of a flow with classes, got shape "
                f"{labels.shape} and {classes} classes"
            )
        if not isinstance(labels, jax.core.Tracer) and batch:
            values = np.asarray(labels)  # jnp would trace under jit
            low, high = int(values.min()), int(values.max())
            if low < -1 or high >= classes:
                raise ValueError(
                    f"cond must lie in [-1, {classes - 1}] (-1 = null), got {low} to {high}"
                )
        if self.config.cond == "class_add":
            return Condition(label=labels)
        index = jnp.where(labels < 0, classes, labels)  # the last one-hot row is the null class
        return Condition(prefix=jax.nn.one_hot(index, classes + 1)[:, None])

    @classmethod
    def from_upstream(
        cls, state_dict: Mapping[str, Any], config: Mapping[str, Any], **kwargs
    ) -> "TARFlow":
        """Load original weights; see `jaxeff.models.starflow.upstream.from_upstream`."""
        from jaxeff.models.starflow.upstream import from_upstream

        return from_upstream(state_dict, config, **kwargs)


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, x: Array, condition: Condition) -> FlowTrace:
    flow: TARFlow = nnx.merge(graphdef, state)
    tokens, grid = flow.to_tokens(x)
    inputs, outputs, log_sigmas = [], [], []
    logdet = jnp.zeros(tokens.shape[0])
    for index, block in enumerate(flow.blocks):
        inputs.append(tokens)
        log_sigma = jnp.zeros_like(tokens)
        if block is not None:
            tokens, log_sigma = flow._push(index, tokens, condition, grid)
            logdet = logdet - log_sigma.mean((1, 2))
        log_sigmas.append(log_sigma)
        outputs.append(tokens)
    z = flow.from_tokens(tokens, grid) if x.ndim == 4 else tokens
    return FlowTrace(z, logdet, tuple(inputs), tuple(outputs), tuple(log_sigmas))


@partial(jax.jit, static_argnums=0)
def _score(graphdef, state, y: Array, cond) -> Array:
    flow: TARFlow = nnx.merge(graphdef, state)
    # nll is a mean over dimensions: its gradient is off the score by the factor N·D.
    size = float(np.prod(y.shape[1:]))
    return -size * jax.grad(lambda value: flow.nll(value, cond).sum())(y)


def _precision(name: str | None):
    return jax.default_matmul_precision(name)


def bits_per_dim(flow: TARFlow, x_int, levels: int, key: Array, cond=None) -> Array:
    """Bits per dimension of integer data under uniform dequantisation, per sample.

    ``x = 2(i + u)/K − 1`` with ``u ~ U[0, 1)``; then
    ``bpd = (mean(½z² + ½ln 2π) − logdet)/ln 2 + log2(K/2)``.

    Args:
      flow: the model.
      x_int: integers in ``[0, K)``, ``[B, H, W, C]``.
      levels: number of levels ``K``, at least 2.
      key: PRNG key of ``u``.
      cond: condition.

    Returns:
      float32 ``[B]``, an upper bound of the model's discrete code length.

    >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8), rngs=nnx.Rngs(0))
    >>> images = jnp.zeros((2, 4, 4, 1), jnp.int32)
    >>> bits_per_dim(flow, images, 17, jax.random.key(0)).shape
    (2,)

    References: TARFlow (arXiv 2412.06329) §4.1 and its ``evaluate_bpd.py``.
    """
    x_int = jnp.asarray(x_int)
    if levels < 2 or not jnp.issubdtype(x_int.dtype, jnp.integer):
        raise ValueError(
            f"x_int must be integers with at least 2 levels, got {x_int.dtype} and {levels}"
        )
    noise = jax.random.uniform(key, x_int.shape)
    x = 2 * (x_int + noise) / levels - 1
    size = np.prod(x_int.shape[1:])
    return -flow.log_prob(x, cond) / (size * math.log(2)) + math.log2(levels / 2)


def denoise(flow: TARFlow, y: Array, sigma: float, cond=None) -> Array:
    """One Tweedie step ``x̂ = y + σ²·∇_y log p(y)`` with the flow's exact score.

    Use the conditional density without guidance, also for guided samples.

    Args:
      flow: a flow trained on ``x + σ·N(0, I)``.
      y: noisy data, as the flow takes it.
      sigma: noise that the flow was trained with, in data units, at least 0.
      cond: condition.

    Returns:
      the posterior mean of x under the model, shape of ``y``. Memory peaks at one backward pass.

    >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8), rngs=nnx.Rngs(0))
    >>> denoise(flow, jnp.ones((2, 4, 4, 1)), 0.1).shape
    (2, 4, 4, 1)

    References: TARFlow (arXiv 2412.06329) §3.4.
    """
    if sigma < 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    flow.condition(cond, y.shape[0])  # checked here, where values are known
    return y + sigma**2 * _score(*nnx.split(flow), y, cond)


def flow_loss(
    flow: TARFlow,
    x: Array,
    cond=None,
    *,
    sigma: float = 0.0,
    drop: float = 0.0,
    latent_norm: float = 0.0,
    key: Array | None = None,
    null_cond: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Training loss: noise, label dropout, likelihood and latent-norm penalty.

    ``mean_b[½mean(z²) − logdet] + c·Σ_blocks mean(u²)`` with ``u`` the input of each block, for
    ``x + σ·N(0, I)``.

    Args:
      flow: the model.
      x: data in [−1, 1] or latents, float.
      cond: condition.
      sigma: noise added to ``x`` at every step.
      drop: probability that a sample's condition is replaced by the null condition.
      latent_norm: ``c``; STARFlow uses 1e-4, TARFlow 0.
      key: PRNG key; needed with ``sigma`` or ``drop``.
      null_cond: null prefix ``[S, E]`` or ``[B, S, E]`` for ``drop`` with text prefixes.

    Returns:
      the loss and ``{"nll", "z", "logdet"}`` averaged over the batch.

    >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8), rngs=nnx.Rngs(0))
    >>> loss, _ = flow_loss(flow, jnp.ones((2, 4, 4, 1)), sigma=0.1, key=jax.random.key(0))
    >>> loss.shape
    ()

    References: TARFlow (arXiv 2412.06329) eq. 6; STARFlow (arXiv 2506.06276) §3.2.
    """
    if (sigma or drop) and key is None:
        raise ValueError(f"key is needed for sigma {sigma} and drop {drop}")
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must lie in [0, 1], got {drop}")
    if sigma:
        x = x + sigma * jax.random.normal(jax.random.fold_in(key, 0), x.shape, x.dtype)
    if drop and cond is not None:
        cond = jnp.asarray(cond)
        dropped = jax.random.bernoulli(jax.random.fold_in(key, 1), drop, (x.shape[0],))
        if jnp.issubdtype(cond.dtype, jnp.integer):
            cond = jnp.where(dropped, -1, cond)
        elif null_cond is None:
            raise ValueError("null_cond is needed to drop prefix conditions")
        else:
            cond = jnp.where(dropped[:, None, None], null_cond, cond)
    z, logdet, inter = flow(x, cond)
    half_square = 0.5 * jnp.mean(jnp.square(z))
    nll = half_square - logdet.mean()
    penalty = sum(jnp.mean(jnp.square(u)) for u in inter) if latent_norm else 0.0
    metrics = {"nll": nll, "z": half_square, "logdet": logdet.mean()}
    return nll + latent_norm * penalty, metrics


def with_dtype(flow: TARFlow, dtype: DTypeLike) -> TARFlow:
    """The same weights with the transformer's arithmetic in another dtype.

    Args:
      flow: the model; it is not changed.
      dtype: floating dtype of the arithmetic. The stored weights keep theirs.

    Returns:
      a flow that shares the weights.

    >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8), rngs=nnx.Rngs(0))
    >>> with_dtype(flow, "bfloat16").blocks[0].proj_in(jnp.ones((1, 4))).dtype.name
    'bfloat16'
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating, got {dtype}")
    copy = nnx.merge(*nnx.split(flow))
    for _, module in nnx.iter_graph(copy):
        if isinstance(module, nnx.Linear | FlowBlock):
            module.dtype = dtype
    return copy


def ema_update(average, state, decay: float):
    """Exponential moving average of weights: ``a ← decay·a + (1 − decay)·w`` on every leaf.

    Args:
      average: pytree of arrays, for example ``nnx.state(flow, nnx.Param)`` at the start.
      state: current weights, same structure.
      decay: in [0, 1); 0.9999 in the papers.

    Returns:
      the new average.

    >>> ema_update({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, 0.75)["w"].tolist()
    [0.25]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    return jax.tree.map(lambda a, w: decay * a + (1 - decay) * w.astype(a.dtype), average, state)

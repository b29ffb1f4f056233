"""The models that are trained: the toy attention layer and small transformers on ``jaxeff.nn``.

An *objective* bundles one task with one model as pure functions of parameters, a key and the
numbers of a run, which may be traced; ``sweep`` maps them over many runs at once.

Reference: Zucchet et al., arXiv 2505.17863, sections 2.1, 2.4, 3.2 and Table 1.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.emergence import metrics, tasks
from jaxeff.nn import Attention

Numbers = Mapping[str, jax.Array]
Curves = dict[str, jax.Array]


class ToyParameters(NamedTuple):
    """Parameters of the toy model: ``score [T]`` and ``weight [d, d]``, float32."""

    score: jax.Array
    weight: jax.Array


def toy_forward(parameters: ToyParameters, inputs: jax.Array) -> jax.Array:
    """``y = W Σ_t softmax(a)_t x_t`` for inputs ``[b, T, d]``; returns ``[b, d]``.

    >>> parameters = ToyParameters(jnp.zeros(2), jnp.eye(3))
    >>> toy_forward(parameters, jnp.ones((1, 2, 3))).tolist()
    [[1.0, 1.0, 1.0]]

    Reference: Eq. 1.
    """
    mixed = jnp.einsum("t,btd->bd", jax.nn.softmax(parameters.score), inputs)
    return mixed @ parameters.weight.T


def toy_population_loss(
    parameters: ToyParameters, target: jax.Array, *, B: int = 1, p: float = 0.0
) -> jax.Array:
    """Exact expected loss of the toy model, for any scores and weights.

    ``L = ½ [ Σ_{t ≤ T−B} α_t² ‖W‖² / d + tr((sW − W*) Σ (sW − W*)ᵀ) ]`` with s the attention on the
    last B positions and Σ the second moment of the relevant token.

    Args:
        parameters: Scores ``[T]`` and weights ``[d, d]``.
        target: ``W*``, ``[d, d]``.
        B: Relevant positions, the last B; may be traced.
        p: Cross-sample repetition of the evaluated data, in [0, 1]; may be traced.

    Returns:
        ``[]`` float32.

    >>> zero = ToyParameters(jnp.zeros(8), jnp.zeros((4, 4)))
    >>> float(toy_population_loss(zero, jnp.eye(4)))
    0.5

    Reference: appendix A.2.
    """
    length, dim = parameters.score.shape[0], target.shape[0]
    weights = jax.nn.softmax(parameters.score)
    relevant = jnp.arange(length) >= length - B
    s = metrics.attention_on(weights, relevant)
    noise = jnp.sum(jnp.where(relevant, 0.0, weights**2)) * jnp.sum(parameters.weight**2) / dim
    variance = (1 - p) / dim + p * jax.nn.one_hot(0, dim)
    return 0.5 * (noise + jnp.sum((s * parameters.weight - target) ** 2 * variance))


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; the paper leaves mask, activation and initialisation open.

    Attributes:
        input_dim: Size of one input vector.
        output_dim: Size of the read-out.
        num_layers: Blocks of attention and MLP.
        embed_dim: Width of the residual stream.
        num_heads: Attention heads in a layer.
        head_dim: Query and key size of a head; ``embed_dim // num_heads`` by default.
        mlp_factor: Width of the MLP over ``embed_dim``.
        layer_norm: Normalise before each attention, each MLP and the read-out.
    """

    input_dim: int
    output_dim: int
    num_layers: int = 2
    embed_dim: int = 256
    num_heads: int = 4
    head_dim: int | None = None
    mlp_factor: int = 4
    layer_norm: bool = False


class _Block(nnx.Module):
    """Attention and a GELU MLP, each added to the stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        dim, hidden = config.embed_dim, config.embed_dim * config.mlp_factor
        norm = functools.partial(nnx.LayerNorm, dim, rngs=rngs) if config.layer_norm else _identity
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(
            dim,
            config.num_heads,
            head_dim=config.head_dim,
            qkv_bias=True,
            out_bias=True,
            rope=None,
            attention_fn=jax.nn.dot_product_attention,
            rngs=rngs,
        )
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array, attention_fn: Callable | None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), attention_fn=attention_fn)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _identity() -> _Identity:
    return _Identity()


class Transformer(nnx.Module):
    """Causal transformer from vectors to one read-out vector, with sinusoidal positions.

    Args:
        config: Sizes.
        rngs: Source of the initial parameters (redrawn by :func:`initial_parameters`).

    >>> config = TransformerConfig(input_dim=5, output_dim=4, embed_dim=16, num_heads=2)
    >>> Transformer(config, rngs=nnx.Rngs(0))(jnp.ones((3, 7, 5)), 6).shape
    (3, 4)

    Reference: section 2.4, 3.2, Table 1.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Linear(config.input_dim, config.embed_dim, rngs=rngs)
        self.layers = nnx.List([_Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.embed_dim, rngs=rngs) if config.layer_norm else _identity()
        self.readout = nnx.Linear(config.embed_dim, config.output_dim, rngs=rngs)

    def __call__(
        self, inputs: jax.Array, read_at: jax.Array | int, *, attention_fn: Callable | None = None
    ) -> jax.Array:
        """Map ``inputs [b, T, input_dim]`` to the read-out ``[b, output_dim]`` at ``read_at``.

        ``attention_fn`` replaces softmax attention for this call.
        """
        x = self.embed(inputs) + sinusoidal_positions(inputs.shape[1], self.config.embed_dim)
        for layer in self.layers:
            x = layer(x, attention_fn)
        return self.readout(self.norm(jnp.take(x, read_at, axis=1)))


def sinusoidal_positions(length: int, dim: int) -> np.ndarray:
    """Sines and cosines of positions 0..T−1 at wavelengths from 2π to 20000π tokens.

    Args:
        length: Tokens T.
        dim: Even width of the result.

    Returns:
        ``[length, dim]`` float32, sines first.

    Raises:
        ValueError: If ``dim`` is odd.

    >>> sinusoidal_positions(2, 4).round(2).tolist()
    [[0.0, 0.0, 1.0, 1.0], [0.8399999737739563, 0.009999999776482582, 0.5400000214576721, 1.0]]

    Reference: Vaswani et al., "Attention is all you need", 2017, section 3.5.
    """
    if dim % 2:
        raise ValueError(f"dim must be even; got {dim}")
    rates = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    angle = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def probed_attention(probe: Callable[[jax.Array], Any], found: list) -> Callable:
    """Causal softmax attention that also hands its weights to ``probe``, layer by layer.

    Args:
        probe: Function of the weights ``[b, N, T, T]``.
        found: List to which the probe's results are appended while tracing.

    Returns:
        A callable for ``attention_fn``. It holds all T×T weights: for short sequences only.

    >>> found = []
    >>> x = jnp.zeros((1, 3, 2, 4))
    >>> _ = probed_attention(lambda w: w[0, 0, 2], found)(x, x, x, is_causal=True)
    >>> bool(jnp.allclose(found[0], 1 / 3))
    True
    """

    def attend(query, key, value, *, is_causal=False, scale=None):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
        if is_causal:
            length = query.shape[1]
            seen = jnp.arange(length)[:, None] >= jnp.arange(length)
            logits = jnp.where(seen, logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1)  # [b, N, T, T]
        found.append(probe(weights))
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    return attend


@functools.cache
def _skeleton(config: TransformerConfig) -> tuple[Any, Any]:
    """Structure and parameter shapes of a transformer, without computing anything."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def initial_parameters(
    config: TransformerConfig, key: jax.Array, *, input_fan_in: jax.Array | float | None = None
) -> Any:
    """Draw parameters as PyTorch's Linear does: weights and biases uniform in ±1/√fan_in.

    Args:
        config: Sizes.
        key: PRNG key.
        input_fan_in: Input dimensions in use, if fewer than ``config.input_dim``; may be traced.

    Returns:
        The parameters of :class:`Transformer` as a pytree.

    >>> config = TransformerConfig(input_dim=4, output_dim=4, embed_dim=16, num_heads=2)
    >>> kernel = initial_parameters(config, jax.random.key(0))["embed"]["kernel"][...]
    >>> bool(0.4 < jnp.abs(kernel).max() <= 0.5)
    True
    """
    _, shapes = _skeleton(config)
    fan_in = {"embed": config.input_dim if input_fan_in is None else input_fan_in}
    hidden = config.embed_dim * config.mlp_factor
    heads = config.num_heads * (config.head_dim or config.embed_dim // config.num_heads)
    fan_in |= {"down": hidden, "out_proj": heads}

    def scaled(path, leaf, uniform):
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        if "scale" in names:
            return jnp.ones(leaf.shape, leaf.dtype)
        if any("norm" in name for name in names):
            return jnp.zeros(leaf.shape, leaf.dtype)
        size = next((fan_in[name] for name in names if name in fan_in), config.embed_dim)
        return uniform.reshape(leaf.shape) / jnp.sqrt(jnp.asarray(size, jnp.float32))

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    # One draw for all leaves: every call of the generator costs compile time.
    parts = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1.0), ends[:-1])
    drawn = [scaled(path, leaf, part) for (path, leaf), part in zip(leaves, parts, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def apply(config: TransformerConfig, parameters: Any, *arguments: Any, **options: Any) -> jax.Array:
    """Call :class:`Transformer` with parameters from :func:`initial_parameters`."""
    return nnx.merge(_skeleton(config)[0], parameters)(*arguments, **options)


def _attention_curves(rows: jax.Array, visible: jax.Array) -> Curves:
    """Sparsity of read-out rows ``[b, N, S]``, averaged over batch and heads."""
    return {
        "entropy": metrics.normalised_entropy(rows, visible).mean(),
        "support": metrics.effective_support(rows).mean(),
        "top1": metrics.top1_mass(rows).mean(),
    }


@dataclass(frozen=True)
class ToyObjective:
    """Stochastic training of the toy model with its real parameters.

    Numbers of a run: ``B``, ``p``. Weights and target start as N(0, 1/d), scores as zero.

    Attributes:
        T: Tokens in a sequence.
        d: Dimension of a token.
        batch_size: Sequences in a step.
    """

    T: int
    d: int
    batch_size: int = 32
    watched = ("loss", 0.1, False)

    def init(self, key: jax.Array, numbers: Numbers) -> tuple[Any, Any]:
        """Draw parameters and target."""
        del numbers
        key_w, key_target = jax.random.split(key)
        weight = tasks.target_matrix(key_w, self.d)
        return ToyParameters(jnp.zeros(self.T), weight), tasks.target_matrix(key_target, self.d)

    def loss(self, parameters: Any, target: Any, key: jax.Array, numbers: Numbers) -> jax.Array:
        """Loss of one batch, ``½ mean ‖y − y*‖²``."""
        batch = tasks.linear_batch(
            key,
            target,
            batch_size=self.batch_size,
            seq_len=self.T,
            B=numbers["B"],
            p=numbers["p"],
            random_positions=False,
        )
        error = toy_forward(parameters, batch.inputs) - batch.targets
        return 0.5 * jnp.mean(jnp.sum(error**2, axis=-1))

    def evaluate(self, parameters: Any, target: Any, key: jax.Array, numbers: Numbers) -> Curves:
        """Population loss without cross-sample repetition, alignment and attention."""
        del key
        weights = jax.nn.softmax(parameters.score)
        product = jnp.sum(parameters.weight * target)
        norms = jnp.linalg.norm(parameters.weight) * jnp.linalg.norm(target)
        relevant = jnp.arange(self.T) >= self.T - numbers["B"]
        return {
            "loss": toy_population_loss(parameters, target, B=numbers["B"]),
            "relevant": metrics.attention_on(weights, relevant),
            "alignment": product / norms,
            "weight": product / jnp.linalg.norm(target),
            "entropy": metrics.normalised_entropy(weights, self.T),
        }


@dataclass(frozen=True)
class LinearObjective:
    """A transformer on the linear task; sizes are maxima, runs may use less.

    Numbers of a run: ``T``, ``d``, ``B``, ``p``. A token is followed by 1 if it is relevant, else
    by 0; the answer is read at the last token.

    Attributes:
        T: Largest number of tokens.
        d: Largest dimension of a token.
        num_layers: Blocks.
        num_heads: Attention heads in a block.
        embed_dim: Width; the paper has 256.
        batch_size: Sequences in a step.
        eval_batch: Sequences in an evaluation.
        feature: Give the indicator of relevance (False: zeros in its place, as in Fig. 14).
        random_positions: Draw relevant positions for each sequence (False: the last B).
    """

    T: int
    d: int
    num_layers: int = 2
    num_heads: int = 4
    embed_dim: int = 256
    batch_size: int = 32
    eval_batch: int = 256
    feature: bool = True
    random_positions: bool = True
    watched = ("loss", 0.1, False)

    @property
    def config(self) -> TransformerConfig:
        """Sizes of the transformer."""
        return TransformerConfig(
            input_dim=self.d + 1,
            output_dim=self.d,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
        )

    def init(self, key: jax.Array, numbers: Numbers) -> tuple[Any, Any]:
        """Draw parameters and target."""
        key_model, key_target = jax.random.split(key)
        parameters = initial_parameters(self.config, key_model, input_fan_in=numbers["d"] + 1)
        return parameters, tasks.target_matrix(key_target, numbers["d"], max_dim=self.d)

    def _batch(self, target, key, numbers, size, p) -> tuple[jax.Array, tasks.LinearBatch]:
        batch = tasks.linear_batch(
            key,
            target,
            batch_size=size,
            seq_len=self.T,
            B=numbers["B"],
            p=p,
            dim=numbers["d"],
            length=numbers["T"],
            random_positions=self.random_positions,
        )
        mark = batch.relevant[..., None].astype(jnp.float32) * float(self.feature)
        return jnp.concatenate([batch.inputs, mark], axis=-1), batch

    def _error(self, parameters, inputs, batch, numbers, **options) -> jax.Array:
        output = apply(self.config, parameters, inputs, numbers["T"] - 1, **options)
        used = jnp.arange(self.d) < numbers["d"]
        return 0.5 * jnp.mean(jnp.sum(jnp.where(used, output - batch.targets, 0) ** 2, axis=-1))

    def loss(self, parameters: Any, target: Any, key: jax.Array, numbers: Numbers) -> jax.Array:
        """Loss of one batch, ``½ mean ‖y − y*‖²``."""
        inputs, batch = self._batch(target, key, numbers, self.batch_size, numbers["p"])
        return self._error(parameters, inputs, batch, numbers)

    def evaluate(self, parameters: Any, target: Any, key: jax.Array, numbers: Numbers) -> Curves:
        """Loss without cross-sample repetition, and attention of the read-out token by layer."""
        inputs, batch = self._batch(target, key, numbers, self.eval_batch, 0.0)

        def probe(weights):
            rows = jnp.take(weights, numbers["T"] - 1, axis=2)  # [b, N, T]
            on = metrics.attention_on(rows, batch.relevant[:, None, :]).mean(0)  # [N]
            return {"relevant": on} | _attention_curves(rows, numbers["T"])

        found: list = []
        loss = self._error(
            parameters, inputs, batch, numbers, attention_fn=probed_attention(probe, found)
        )
        return {"loss": loss} | {
            f"{name}_{layer}": value
            for layer, curves in enumerate(found)
            for name, value in curves.items()
        }


@dataclass(frozen=True)
class RecallObjective:
    """A transformer on associative recall; sizes are maxima, runs may use less.

    Numbers of a run: ``num_pairs``, ``vocab_size``, ``B``, ``p``.

    Attributes:
        num_pairs: Largest number of key-value pairs.
        vocab_size: Largest vocabulary.
        num_layers: Blocks; the paper has 4.
        num_heads: Attention heads in a block.
        embed_dim: Width; the paper has 256.
        batch_size: Sequences in a step.
        eval_batch: Sequences in an evaluation.
        layer_norm: Pre-layer-norm; the paper's text says so, its Table 1 does not.
        literal_bernoulli: Use the printed generator, which loses queries.
    """

    num_pairs: int
    vocab_size: int
    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 256
    batch_size: int = 32
    eval_batch: int = 256
    layer_norm: bool = True
    literal_bernoulli: bool = False
    watched = ("accuracy", 0.5, True)

    @property
    def config(self) -> TransformerConfig:
        """Sizes of the transformer."""
        return TransformerConfig(
            input_dim=self.vocab_size,
            output_dim=self.vocab_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            layer_norm=self.layer_norm,
        )

    def init(self, key: jax.Array, numbers: Numbers) -> tuple[Any, Any]:
        """Draw parameters; there is no other state."""
        return initial_parameters(self.config, key, input_fan_in=numbers["vocab_size"]), ()

    def _batch(self, key, numbers, size, **options) -> tuple[jax.Array, tasks.RecallBatch]:
        batch = tasks.recall_batch(
            key,
            batch_size=size,
            num_pairs=numbers["num_pairs"],
            vocab_size=numbers["vocab_size"],
            max_pairs=self.num_pairs,
            max_vocab=self.vocab_size,
            **options,
        )
        return jax.nn.one_hot(batch.tokens, self.vocab_size), batch

    def _logits(self, parameters, inputs, batch, numbers, **options) -> jax.Array:
        logits = apply(self.config, parameters, inputs, batch.query_position, **options)
        return jnp.where(jnp.arange(self.vocab_size) < numbers["vocab_size"], logits, -jnp.inf)

    def loss(self, parameters: Any, extra: Any, key: jax.Array, numbers: Numbers) -> jax.Array:
        """Cross-entropy of one batch, in nats."""
        del extra
        inputs, batch = self._batch(
            key,
            numbers,
            self.batch_size,
            B=numbers["B"],
            p=numbers["p"],
            literal_bernoulli=self.literal_bernoulli,
        )
        return _cross_entropy(self._logits(parameters, inputs, batch, numbers), batch.targets)

    def evaluate(self, parameters: Any, extra: Any, key: jax.Array, numbers: Numbers) -> Curves:
        """Loss and accuracy without any repetition, and the induction scores by layer."""
        del extra
        inputs, batch = self._batch(key, numbers, self.eval_batch)

        def probe(weights):
            prev_token, select = metrics.induction_scores(
                weights, batch.is_query, batch.query_position
            )
            rows = jnp.take(weights, batch.query_position, axis=2)
            curves = _attention_curves(rows, batch.query_position + 1)
            return {"prev_token": prev_token, "select": select} | curves

        found: list = []
        logits = self._logits(
            parameters, inputs, batch, numbers, attention_fn=probed_attention(probe, found)
        )
        return {
            "loss": _cross_entropy(logits, batch.targets),
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.targets),
        } | {
            f"{name}_{layer}": value
            for layer, curves in enumerate(found)
            for name, value in curves.items()
        }


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


Objective = ToyObjective | LinearObjective | RecallObjective

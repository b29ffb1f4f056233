"""The configuration of the decoder: one dataclass for all served model families."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from jaxeff.nn.rope import RopeConfig
from jaxeff.nn.transformer import ACTIVATIONS

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the decoder's computation, apart from its weights.

    Args:
        vocab_size: ``V``, tokens.
        num_layers: number of transformer blocks.
        embed_dim: model dimension ``D``.
        num_heads: query heads ``N``.
        num_kv_heads: key-value heads ``K``, a divisor of ``N``.
        head_dim: ``H``, even.
        mlp_dim: hidden dimension ``F`` of the gated MLP.
        norm_eps: ``eps`` of every RMSNorm.
        rope: RoPE of the layers with full attention.
        local_rope: RoPE of the layers with a window; ``None`` for the same as ``rope`` (and made
            ``None`` where it is the same, or where no layer has a window).
        layer_windows: per layer the number of tokens a query sees, itself included, or ``None``
            for full attention; empty means full attention in all layers.
        qkv_bias: biases in the query, key and value projections.
        out_bias: bias in the attention's output projection.
        mlp_bias: biases in the MLP.
        qk_norm: RMSNorm on query and key heads.
        tie_embeddings: the output projection is the embedding transposed.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        smooth_mlp: Smooth-SwiGLU: the hidden channels of the MLP are scaled to a maximum of 1 for
            low-precision training; the function is the same.
        norm_scale_plus_one: norms multiply by ``1 + scale`` (Gemma).
        post_norms: a norm after attention and MLP as well (Gemma).
        embed_scale: factor on the embeddings, or ``None`` for 1 (Gemma: ``sqrt(D)``).
        query_scale: softmax scale, or ``None`` for ``H ** -0.5`` (and made ``None`` where it is
            that).
        final_logit_soft_cap: ``c`` in ``c · tanh(logits / c)``, or ``None``.
        max_position_embeddings: context length in tokens that the model was trained for, if
            known; carried along, never enforced.

    Raises:
        ValueError: a size is below 1, head counts do not divide, or a name is unknown.

    >>> ModelConfig.llama(vocab_size=256, num_layers=2, embed_dim=64, num_heads=4).head_dim
    16
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()  # noqa: RUF009 (frozen)
    local_rope: RopeConfig | None = None
    layer_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    activation: str = "silu"
    smooth_mlp: bool = False
    norm_scale_plus_one: bool = False
    post_norms: bool = False
    embed_scale: float | None = None
    query_scale: float | None = None
    final_logit_soft_cap: float | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self):
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        windows = tuple(self.layer_windows) or (None,) * self.num_layers
        object.__setattr__(self, "layer_windows", windows)
        if len(windows) != self.num_layers:
            raise ValueError(
                f"layer_windows has {len(windows)} entries; expected one per layer "
                f"({self.num_layers})"
            )
        for layer, window in enumerate(windows):
            if window is not None:
                _check_size(f"layer_windows[{layer}]", window)
        if self.max_position_embeddings is not None:
            _check_size("max_position_embeddings", self.max_position_embeddings)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; num_heads ({self.num_heads}) must be a "
                "multiple of it"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE needs an even number")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            )
        for name in ("norm_eps", "embed_scale", "query_scale", "final_logit_soft_cap"):
            _check_positive(name, getattr(self, name))
        # One spelling per computation, so that equal models have equal configurations.
        if self.query_scale == self.head_dim**-0.5:
            object.__setattr__(self, "query_scale", None)
        if self.local_rope == self.rope or not any(windows):
            object.__setattr__(self, "local_rope", None)

    def layer_rope(self, layer: int) -> RopeConfig:
        """Return the RoPE of layer number ``layer``: ``local_rope`` where it has a window.

        >>> config = ModelConfig.gemma3(
        ...     vocab_size=8, num_layers=6, embed_dim=8, num_heads=2, head_dim=4
        ... )
        >>> config.layer_rope(0).theta, config.layer_rope(5).theta
        (10000.0, 1000000.0)
        """
        if self.layer_windows[layer] is not None and self.local_rope is not None:
            return self.local_rope
        return self.rope

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers, strings and lists, ready for JSON.

        >>> config = ModelConfig.llama(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2)
        >>> ModelConfig.from_dict(config.to_dict()) == config
        True
        """
        return dataclasses.asdict(self) | {"layer_windows": list(self.layer_windows)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Rebuild a configuration from :meth:`to_dict`.

        Raises:
            ValueError: a field is unknown or a needed one is missing.

        >>> ModelConfig.from_dict({"vocab": 8})
        Traceback (most recent call last):
        ...
        ValueError: model config has unknown fields vocab
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - names):
            raise ValueError(f"model config has unknown fields {', '.join(unknown)}")
        if missing := [name for name in _SIZES if name not in fields]:
            raise ValueError(f"model config lacks the fields {', '.join(missing)}")
        fields = dict(fields)
        for name in ("rope", "local_rope"):
            if isinstance(fields.get(name), dict):
                fields[name] = RopeConfig(**fields[name])
        return cls(**fields)

    @classmethod
    def llama(
        cls,
        *,
        vocab_size: int,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int | None = None,
        **fields: Any,
    ) -> Self:
        """Return a Llama 3 style configuration; sizes left out follow from the others.

        ``num_kv_heads = N``, ``head_dim = D // N``, ``mlp_dim = 8/3 · D`` rounded up to a
        multiple of 16, ``theta = 500000``. Further fields are passed on.

        >>> ModelConfig.llama(vocab_size=256, num_layers=3, embed_dim=128, num_heads=4).mlp_dim
        352

        References: Llama Team, "The Llama 3 Herd of Models", 2024, section 3.2.
        """
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
        for name, value in sizes.items():
            _check_size(name, value)
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; "
                    "give head_dim"
                )
            head_dim = embed_dim // num_heads
        return cls(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            mlp_dim=math.ceil(embed_dim * 8 / 3 / 16) * 16 if mlp_dim is None else mlp_dim,
            **sizes,
            **({"rope": RopeConfig(theta=500_000.0)} | fields),
        )

    @classmethod
    def qwen2(cls, **fields: Any) -> Self:
        """Return a Qwen 2.5 style configuration: :meth:`llama` with biases on q, k and v.

        >>> ModelConfig.qwen2(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2).qkv_bias
        True

        References: Qwen Team, "Qwen2.5 Technical Report", 2024, section 2.
        """
        return cls.llama(**({"qkv_bias": True, "rope": RopeConfig(theta=1_000_000.0)} | fields))

    @classmethod
    def qwen3(cls, **fields: Any) -> Self:
        """Return a Qwen 3 style configuration: :meth:`llama` with norms on query and key heads.

        >>> ModelConfig.qwen3(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2).qk_norm
        True

        References: Qwen Team, "Qwen3 Technical Report", 2025, section 2.
        """
        return cls.llama(**({"qk_norm": True, "rope": RopeConfig(theta=1_000_000.0)} | fields))

    @classmethod
    def gemma3(
        cls, *, num_layers: int, embed_dim: int, window: int = 512, pattern: int = 6, **fields: Any
    ) -> Self:
        """Return a Gemma 3 style configuration: every ``pattern``-th layer sees the whole context.

        The other layers see ``window`` tokens, with their own RoPE of ``theta = 10000``.

        >>> ModelConfig.gemma3(
        ...     vocab_size=8, num_layers=3, embed_dim=8, num_heads=2, window=4, pattern=3
        ... ).layer_windows
        (4, 4, None)

        References: Gemma Team, "Gemma 3 Technical Report", 2025, section 2.
        """
        family = {
            "rope": RopeConfig(theta=1_000_000.0),
            "local_rope": RopeConfig(theta=10_000.0),
            "layer_windows": tuple(
                None if (layer + 1) % pattern == 0 else window for layer in range(num_layers)
            ),
            "qk_norm": True,
            "tie_embeddings": True,
            "activation": "gelu_tanh",
            "norm_scale_plus_one": True,
            "post_norms": True,
            "embed_scale": math.sqrt(embed_dim),
        }
        return cls.llama(num_layers=num_layers, embed_dim=embed_dim, **(family | fields))


_SIZES = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
)


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer, at least 1")


def _check_positive(name: str, value: Any) -> None:
    if value is None and name != "norm_eps":
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}; expected a finite number above 0")

"""Configuration of TARFlow and STARFlow: one dataclass holds every switch of both conventions."""

import dataclasses
from dataclasses import dataclass

__all__ = [
    "PRESETS",
    "TARFlowConfig",
    "starflow_tiny",
    "starflow_xl",
    "starflow_xxl",
    "tarflow_in64",
    "tarflow_mnist",
]

_CHOICES = {
    "scale": ("exp", "softplus"),
    "cond": ("none", "class_add", "prefix_deep", "prefix_all"),
    "order": ("R2L", "L2R"),
    "patch_order": ("c_p_p", "p_p_c"),
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "geglu"),
    "rope_pairs": ("interleaved", "half"),
}


@dataclass(frozen=True)
class TARFlowConfig:
    """Sizes and conventions of an autoregressive transformer flow.

    The defaults are TARFlow's convention (exp scale, shifted output, learned positions). STARFlow's
    is ``scale="softplus", sos=True, rope=True, soft_clip=4.0, final_norm=True, cond="prefix_deep",
    order="L2R", patch_order="p_p_c"``. The two are not interchangeable for trained weights.

    Attributes:
      in_channels: channels ``C`` of the image or latent.
      img_size: side of the training image in pixels.
      patch_size: side ``P`` of a patch in pixels; a token holds ``D = C·P²`` values.
      width: hidden dimensions of the transformer.
      layers_per_block: transformer layers of each block, data side first; the last block is the
        deep one, nearest the noise. 0 makes a shallow block the identity.
      head_dim: dimensions of one attention head.
      num_heads: query heads; by default ``width // head_dim``.
      num_kv_heads: key-value heads; by default as many as query heads.
      expansion: hidden dimensions of the MLP over ``width``.
      deep_width: width of the last block; by default ``width``.
      num_classes: classes of an integer ``cond``; 0 without integer conditions.
      scale: σ as a function of the raw output ``a``: ``exp(a)`` or ``softplus(a + ln(e−1))``.
      volume_preserving: σ = 1 and a learned prior variance (TARFlow's VP variant).
      sos: a learned first input, so that the first token is transformed too; otherwise outputs are
        shifted by one and the first token passes unchanged.
      rope: 2-D rotary positions; otherwise a learned table tied to space.
      rope_pairs: rotate pairs ``(2i, 2i+1)`` or ``(i, i + H/2)``.
      rope_length: tokens per image side that positions are scaled to; by default the training side.
      soft_clip: raw outputs become ``s·tanh(raw/s)``; 0 turns it off.
      final_norm: RMSNorm before the output projection.
      cond: no condition, a class vector added to every token, or prefix tokens in the deep block
        only or in every block.
      prefix_len: prefix tokens ``S``.
      prefix_dim: values ``E`` of a prefix token. With ``num_classes`` it is ``num_classes + 1``
        (one-hot, last = null).
      order: which blocks run backwards: R2L the odd ones, L2R the even ones.
      patch_order: order of the values in a token: channel first or channel last.
      norm: pre-norm of the layers.
      mlp: GELU MLP (exact) or GELU-gated MLP (tanh approximation).
      qk_norm: RMSNorm on queries and keys.
      post_norm: RMSNorm on the output of attention and MLP.
      use_bias: biases in attention and MLP.

    Raises:
      ValueError: when a field is out of range or two fields contradict each other.

    Example:
      >>> config = TARFlowConfig(1, 8, 2, 64, (2, 2), head_dim=32)
      >>> config.num_tokens, config.token_dim, config.reversed_blocks
      (16, 4, (False, True))

    References: TARFlow (arXiv 2412.06329) §3; STARFlow (arXiv 2506.06276) §3.
    """

    in_channels: int
    img_size: int
    patch_size: int
    width: int
    layers_per_block: tuple[int, ...]
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    expansion: float = 4
    deep_width: int | None = None
    num_classes: int = 0
    scale: str = "exp"
    volume_preserving: bool = False
    sos: bool = False
    rope: bool = False
    rope_pairs: str = "interleaved"
    rope_length: int | None = None
    soft_clip: float = 0.0
    final_norm: bool = False
    cond: str = "none"
    prefix_len: int = 0
    prefix_dim: int = 0
    order: str = "R2L"
    patch_order: str = "c_p_p"
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    post_norm: bool = False
    use_bias: bool = True

    def __post_init__(self):
        object.__setattr__(self, "layers_per_block", tuple(self.layers_per_block))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("in_channels", "img_size", "patch_size", "width", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.img_size % self.patch_size:
            raise ValueError(
                f"img_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.img_size}"
            )
        layers = self.layers_per_block
        if not layers or min(layers) < 0 or layers[-1] < 1:
            raise ValueError(
                "layers_per_block must hold at least one block, no negative number and a last "
                f"block of at least one layer, got {layers}"
            )
        if self.soft_clip < 0:
            raise ValueError(f"soft_clip must be 0 (off) or positive, got {self.soft_clip}")
        self._check_heads()
        self._check_cond()

    def _check_heads(self):
        for deep in (False, True):
            width = self.block_width(deep)
            if self.num_heads is None and width % self.head_dim:
                raise ValueError(
                    f"width must be a multiple of head_dim ({self.head_dim}), got {width}"
                )
            heads, kv_heads = self.block_heads(deep)
            if kv_heads < 1 or heads % kv_heads:
                raise ValueError(
                    f"num_kv_heads must divide the number of query heads ({heads}), got {kv_heads}"
                )
        if self.rope and (self.head_dim % 2 or (self.head_dim // 2 - self.rope_text_angles) % 2):
            raise ValueError(
                "head_dim must give equally many row and column angles: (head_dim / 2 - "
                f"{self.rope_text_angles}) must be even, got head_dim {self.head_dim}"
            )
        if self.rope and self.head_dim // 2 <= self.rope_text_angles:
            raise ValueError(
                f"head_dim must exceed {2 * self.rope_text_angles} for rotary positions with a "
                f"prefix (8 angles are kept for it), got {self.head_dim}"
            )

    def _check_cond(self):
        prefixed = self.cond.startswith("prefix")
        if self.cond == "class_add" and self.num_classes < 1:
            raise ValueError(
                f'num_classes must be at least 1 for cond="class_add", got {self.num_classes}'
            )
        if prefixed and (self.prefix_len < 1 or self.prefix_dim < 1):
            raise ValueError(
                f"prefix_len and prefix_dim must be at least 1 for cond={self.cond!r}, "
                f"got {self.prefix_len} and {self.prefix_dim}"
            )
        if not prefixed and (self.prefix_len or self.prefix_dim):
            raise ValueError(
                f"prefix_len and prefix_dim must be 0 for cond={self.cond!r}, "
                f"got {self.prefix_len} and {self.prefix_dim}"
            )
        if self.cond == "none" and self.num_classes:
            raise ValueError(f'num_classes must be 0 for cond="none", got {self.num_classes}')
        one_hot = (1, self.num_classes + 1)
        if prefixed and self.num_classes and (self.prefix_len, self.prefix_dim) != one_hot:
            raise ValueError(
                f"(prefix_len, prefix_dim) must be {one_hot} for {self.num_classes} one-hot "
                f"classes, got {(self.prefix_len, self.prefix_dim)}"
            )

    @property
    def num_blocks(self) -> int:
        """Number of blocks ``T``, identity blocks included."""
        return len(self.layers_per_block)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of a training image."""
        return (self.img_size // self.patch_size,) * 2

    @property
    def num_tokens(self) -> int:
        """Tokens ``N`` of a training image."""
        return self.grid[0] * self.grid[1]

    @property
    def token_dim(self) -> int:
        """Values ``D = C·P²`` of a token."""
        return self.in_channels * self.patch_size**2

    @property
    def reversed_blocks(self) -> tuple[bool, ...]:
        """For each block whether it reads the tokens backwards."""
        first = self.order == "L2R"
        return tuple((index % 2 == 0) == first for index in range(self.num_blocks))

    @property
    def rope_text_angles(self) -> int:
        """Rotary angles of a head kept for the prefix index: 8 where the model has a prefix."""
        return 8 if self.prefix_len else 0

    def block_width(self, deep: bool) -> int:
        """Hidden dimensions of the deep block or of a shallow one."""
        return (self.deep_width or self.width) if deep else self.width

    def block_heads(self, deep: bool) -> tuple[int, int]:
        """Query and key-value heads of the deep block or of a shallow one."""
        heads = self.num_heads or self.block_width(deep) // self.head_dim
        return heads, self.num_kv_heads or heads

    def block_has_prefix(self, index: int) -> bool:
        """Whether block ``index`` reads the prefix tokens."""
        if self.cond == "prefix_all":
            return True
        return self.cond == "prefix_deep" and index == self.num_blocks - 1

    def to_dict(self) -> dict:
        """All fields as plain values, for checkpoints and reports."""
        return dataclasses.asdict(self) | {"layers_per_block": list(self.layers_per_block)}


def tarflow_mnist(**changes) -> TARFlowConfig:
    """TARFlow's notebook model: 28² grey, 4 blocks × 4 layers, width 128."""
    fields = {"num_classes": 10, "cond": "class_add"} | changes
    return TARFlowConfig(1, 28, 4, **({"width": 128, "layers_per_block": (4,) * 4} | fields))


def tarflow_in64(**changes) -> TARFlowConfig:
    """TARFlow on ImageNet 64²: patch 2, 8 blocks × 8 layers, width 768."""
    return TARFlowConfig(3, 64, 2, **({"width": 768, "layers_per_block": (8,) * 8} | changes))


def _starflow(changes: dict) -> TARFlowConfig:
    fields = {
        "in_channels": 4,
        "img_size": 32,
        "patch_size": 1,
        "scale": "softplus",
        "sos": True,
        "rope": True,
        "soft_clip": 4.0,
        "final_norm": True,
        "order": "L2R",
        "patch_order": "p_p_c",
    }
    return TARFlowConfig(**(fields | changes))


def starflow_xl(num_classes: int = 1000, **changes) -> TARFlowConfig:
    """STARFlow 18(6)-2048, 1.4 billion parameters, class prefix in the deep block."""
    fields = {
        "width": 2048,
        "layers_per_block": (2, 2, 2, 2, 2, 18),
        "cond": "prefix_deep",
        "num_classes": num_classes,
        "prefix_len": 1,
        "prefix_dim": num_classes + 1,
    }
    return _starflow(fields | changes)


def starflow_xxl(**changes) -> TARFlowConfig:
    """STARFlow 24(6)-3072, 3.8 billion parameters, 128 text tokens of 2048 values as prefix."""
    fields = {
        "width": 3072,
        "layers_per_block": (2, 2, 2, 2, 2, 24),
        "cond": "prefix_deep",
        "prefix_len": 128,
        "prefix_dim": 2048,
    }
    return _starflow(fields | changes)


def starflow_tiny(num_classes: int = 5, **changes) -> TARFlowConfig:
    """A STARFlow small enough for two CPU cores: 16² RGB, patch 2, [2, 2, 4] layers, width 64."""
    fields = {
        "in_channels": 3,
        "img_size": 16,
        "patch_size": 2,
        "width": 64,
        "head_dim": 32,
        "layers_per_block": (2, 2, 4),
        "cond": "prefix_deep",
        "num_classes": num_classes,
        "prefix_len": 1,
        "prefix_dim": num_classes + 1,
    }
    return _starflow(fields | changes)


PRESETS = {
    "tarflow_mnist": tarflow_mnist,
    "tarflow_in64": tarflow_in64,
    "starflow_xl": starflow_xl,
    "starflow_xxl": starflow_xxl,
    "starflow_tiny": starflow_tiny,
}

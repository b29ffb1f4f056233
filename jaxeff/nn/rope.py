"""Rotary position embedding with the default, linear and Llama 3 frequency rules."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxeff.typing import Array

__all__ = ["ROPE_TYPES", "RopeConfig", "apply_rope", "rope_frequencies"]

ROPE_TYPES = ("default", "linear", "llama3")
# Rules that exist elsewhere and are not computed here, so that the error can say so.
_OTHER_ROPE_TYPES = ("dynamic", "yarn", "longrope", "su", "mrope", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """How the rotation frequencies of one kind of layer are computed.

    Args:
        theta: base of the geometric series of wavelengths, > 1.
        rope_type: ``"default"``, ``"linear"`` (all frequencies divided by ``factor``) or
            ``"llama3"`` (only the low ones).
        factor: how far the context is stretched, ≥ 1; used by ``linear`` and ``llama3``.
        low_freq_factor: ``llama3`` only; wavelengths above
            ``original_max_position_embeddings / low_freq_factor`` tokens are divided by ``factor``.
        high_freq_factor: ``llama3`` only; wavelengths below
            ``original_max_position_embeddings / high_freq_factor`` tokens are left alone.
        original_max_position_embeddings: ``llama3`` only; context length before stretching, tokens.

    Raises:
        ValueError: a number is out of range or the rule is unknown.
        NotImplementedError: the rule exists, but is not served (yarn, dynamic, longrope, ...).

    >>> RopeConfig(theta=500000.0, rope_type="llama3", factor=8.0).low_freq_factor
    1.0
    """

    theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.rope_type in _OTHER_ROPE_TYPES:
            raise NotImplementedError(
                f"rope_type {self.rope_type!r} is not served; served are {', '.join(ROPE_TYPES)}"
            )
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {self.rope_type!r} is unknown; expected one of {', '.join(ROPE_TYPES)}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"rope {name} is {value!r}; expected a number")
        length = self.original_max_position_embeddings
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                "rope original_max_position_embeddings is "
                f"{length!r}; expected a number of tokens, at least 1"
            )
        if not (self.theta > 1 and math.isfinite(self.theta)):
            raise ValueError(f"rope theta is {self.theta}; expected a finite number above 1")
        if not (self.factor >= 1 and math.isfinite(self.factor)):
            raise ValueError(f"rope factor is {self.factor}; expected a finite number, at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rope low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected 0 < low_freq_factor < high_freq_factor"
            )


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
    """Return the rotation frequencies of one head in radians per token.

    ``f_i = theta^(-2i / H)`` for ``i = 0 … H/2 - 1``; ``linear`` divides all by ``factor``;
    ``llama3`` divides those with a wavelength ``2π/f`` above ``L / low_freq_factor`` and blends
    linearly in ``L / wavelength`` down to ``L / high_freq_factor``
    (``L = original_max_position_embeddings``).

    Args:
        head_dim: ``H``, even, at least 2.
        config: the rule.

    Returns:
        float32 ``[H // 2]``, a numpy array: a constant of the compiled program.

    Raises:
        ValueError: ``head_dim`` is odd or below 2.

    >>> rope_frequencies(4, RopeConfig(theta=100.0)).tolist()
    [1.0, 0.10000000149011612]

    References: Su et al., "RoFormer", 2021, section 3.2.2; Chen et al., "Extending Context Window
    of Large Language Models via Positional Interpolation", 2023, section 2.3 (linear); Llama Team,
    "The Llama 3 Herd of Models", 2024, section 3.2.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; RoPE needs an even number, at least 2")
    freqs = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [H // 2]
    if config.rope_type == "linear":
        freqs = freqs / config.factor
    elif config.rope_type == "llama3":
        turns = config.original_max_position_embeddings * freqs / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: unchanged, 0: stretched
        freqs = keep * freqs + (1 - keep) * freqs / config.factor
    return freqs.astype(np.float32)


def apply_rope(x: Array, positions: Array, config: RopeConfig) -> Array:
    """Rotate each head by angles that grow with the position of its token.

    With ``a = position · f`` and ``x = [u, v]`` (first and second half of the head):
    ``y = [u cos a - v sin a, v cos a + u sin a]``, in float32, rounded to the dtype of ``x``.

    Args:
        x: ``[B, T, N, H]`` floating point, ``H`` even.
        positions: ``[B, T]`` integer, logical positions in tokens, ≥ 0 and below 2²⁴ (exact in
            float32).
        config: the frequency rule.

    Returns:
        Array of the shape and dtype of ``x``.

    Raises:
        ValueError: ``H`` is odd, or ``positions`` does not have the shape ``[B, T]``.

    >>> import jax.numpy as jnp
    >>> y = apply_rope(jnp.ones((1, 1, 1, 2)), jnp.array([[1]]), RopeConfig())
    >>> [round(v, 3) for v in y.ravel().tolist()]  # cos 1 - sin 1, cos 1 + sin 1
    [-0.301, 1.382]

    References: Su et al., "RoFormer", 2021, section 3.4.2 (halves instead of neighbouring pairs).
    """
    if x.ndim != 4 or positions.shape != x.shape[:2]:
        raise ValueError(
            f"positions have shape {positions.shape} and x {x.shape}; "
            "expected x [B, T, N, H] and positions [B, T]"
        )
    freqs = jnp.asarray(rope_frequencies(x.shape[-1], config))
    angles = positions.astype(jnp.float32)[:, :, None, None] * freqs  # [B, T, 1, H // 2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)

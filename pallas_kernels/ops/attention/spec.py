# SPDX-License-Identifier: Apache-2.0
"""Static facts of an attention call, the quantised variants, and who can serve what."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels._device import Device, xla_is_deterministic

GRANULARITIES = ("per_tensor", "per_block", "per_warp", "per_thread", "per_token")
QK_FORMATS = ("int8", "int4", "fp8_e4m3", "nvfp4")
PV_FORMATS = ("fp8_e4m3", "int8", "nvfp4", "fp16", "bf16", "half")
IMPLEMENTATIONS = ("mosaic", "xla", "reference")
ANY_ORDER = (
    "deterministic=True: XLA may add in any order on a GPU; set "
    "XLA_FLAGS=--xla_gpu_deterministic_ops=true"
)


@dataclasses.dataclass(frozen=True)
class AttentionQuant:
    """A recipe for attention in low precision, of the SageAttention family.

    ``P = softmax(scale * deq(quant(Q)) deq(quant(K - mean K))^T)`` and ``O = quant(P) quant(V)``,
    evaluated tile by tile with `block_kv` keys, so that P is quantised relative to the running
    maximum. All variants accumulate in float32 across tiles.

    Args:
      name: label in messages.
      qk: format of Q and K: "int8", "int4", "fp8_e4m3" or "nvfp4" (tiles of 16 along head_dim).
      granularity: tokens that share one scale of Q or K: "per_tensor" (a whole head),
        "per_block" (`block_q` / `block_kv` tokens), "per_warp" (`warp_q` queries, `block_kv`
        keys), "per_thread" (the tokens one thread of the matrix unit sees) or "per_token".
        Not used by "nvfp4".
      pv: format of P and V: "fp8_e4m3", "int8", "nvfp4", "fp16", "bf16", or "half" (float16 for
        float16 values and bfloat16 for others, so that bfloat16 values cannot overflow).
      block_q: queries per tile.
      block_kv: keys per tile.
      warp_q: queries per warp, 16 or 32; divides `block_q`.
      smooth_k: subtract the mean key of each sequence and head before quantising.
      smooth_q: subtract the mean query of each `block_q` tile; its product with K is kept in
        float32 and added to the logits.
      smooth_v: subtract the mean value before quantising and add it to the output.
      v_granularity: "per_channel", "per_tensor" or "per_block" (`block_kv` tokens of a head; "int8"
        only) scales of V ("nvfp4": tiles of 16 tokens).
      p_granularity: scale of P for "int8": "static", 1 / 127, or "per_row", each row's maximum in
        its tile over 127.
      backward: "float", the gradient of unquantised attention, or "int8": that of SageBwd, with
        P, dO and dS rounded to INT8 per tile of `block_q` x `block_kv` and dO V^T left in 16 bits.
      v_max: largest quantised value of V for "fp8_e4m3"; 2.25 keeps a float16 accumulator from
        overflowing.
      accumulator: "float32" or "float16" inside one product of P and V; a float16 accumulator
        is rounded after every 32 keys and emptied into float32 after every 64.
      two_level: start a fresh accumulator for every tile of keys. Without it a kernel may let the
        tensor core's own accumulator, which is narrower than float32, run on.

    Raises:
      ValueError: an unknown name, or block sizes that do not divide.

    >>> QUANTS["sage2"].granularity
    'per_thread'
    """

    name: str = "custom"
    qk: Literal["int8", "int4", "fp8_e4m3", "nvfp4"] = "int8"
    granularity: str = "per_thread"
    pv: str = "fp8_e4m3"
    block_q: int = 64
    block_kv: int = 128
    warp_q: int = 16
    smooth_k: bool = True
    smooth_q: bool = False
    smooth_v: bool = False
    v_granularity: Literal["per_channel", "per_tensor", "per_block"] = "per_channel"
    p_granularity: Literal["static", "per_row"] = "static"
    backward: Literal["float", "int8"] = "float"
    v_max: float = 448.0
    accumulator: Literal["float32", "float16"] = "float32"
    two_level: bool = True

    def __post_init__(self):
        allowed = {
            "qk": QK_FORMATS,
            "granularity": GRANULARITIES,
            "pv": PV_FORMATS,
            "v_granularity": ("per_channel", "per_tensor", "per_block"),
            "p_granularity": ("static", "per_row"),
            "backward": ("float", "int8"),
            "accumulator": ("float32", "float16"),
        }
        for field, names in allowed.items():
            if getattr(self, field) not in names:
                raise ValueError(
                    f"AttentionQuant: {field} must be one of {', '.join(names)}; "
                    f"got {getattr(self, field)!r}"
                )
        if self.block_q < 1 or self.block_kv < 1 or self.warp_q < 1:
            raise ValueError(
                "AttentionQuant: block_q, block_kv and warp_q must be at least 1; got "
                f"{self.block_q}, {self.block_kv}, {self.warp_q}"
            )
        if self.block_q % self.warp_q:
            raise ValueError(
                f"AttentionQuant: block_q ({self.block_q}) must be a multiple of warp_q "
                f"({self.warp_q})"
            )
        if self.granularity == "per_thread" and (self.warp_q % 8 or self.block_kv % 8):
            raise ValueError(
                "AttentionQuant: per_thread needs warp_q and block_kv to be multiples of 8; got "
                f"{self.warp_q} and {self.block_kv}"
            )
        if self.pv == "nvfp4" and self.block_kv % 16:
            raise ValueError(
                f"AttentionQuant: pv='nvfp4' needs block_kv to be a multiple of 16; "
                f"got {self.block_kv}"
            )
        if self.accumulator == "float16" and (self.pv != "fp8_e4m3" or self.block_kv % 64):
            raise ValueError(
                "AttentionQuant: accumulator='float16' needs pv='fp8_e4m3' and block_kv a multiple "
                f"of 64; got {self.pv!r} and {self.block_kv}"
            )
        if self.pv != "int8" and (self.v_granularity, self.p_granularity) not in (
            ("per_channel", "static"), ("per_tensor", "static"),
        ):  # fmt: skip
            raise ValueError(
                "AttentionQuant: v_granularity='per_block' and p_granularity='per_row' need "
                f"pv='int8'; got {self.pv!r}"
            )
        if self.backward == "int8" and (self.qk != "int8" or self.smooth_q):
            raise ValueError(
                "AttentionQuant: backward='int8' needs qk='int8' and smooth_q=False; got "
                f"{self.qk!r} and {self.smooth_q}"
            )
        if not 0 < self.v_max <= 448:
            raise ValueError(f"AttentionQuant: v_max must be in (0, 448]; got {self.v_max}")


QUANTS = {
    quant.name: quant
    for quant in (
        AttentionQuant(
            "sage1", granularity="per_block", pv="half", block_q=128, block_kv=64, warp_q=32
        ),
        AttentionQuant("sage2"),
        AttentionQuant(
            "sage2pp", block_q=128, block_kv=64, warp_q=32, v_max=2.25, accumulator="float16"
        ),
        AttentionQuant("sage2_int4", qk="int4", block_q=128, block_kv=64, warp_q=32, smooth_q=True),
        AttentionQuant(
            "sage3", qk="nvfp4", pv="nvfp4", block_q=128, block_kv=128, warp_q=32, smooth_q=True
        ),
        AttentionQuant(
            "fp8",
            qk="fp8_e4m3",
            granularity="per_tensor",
            v_granularity="per_tensor",
            smooth_k=False,
        ),
        AttentionQuant(
            "sage_bwd",
            granularity="per_block",
            pv="int8",
            block_q=64,
            block_kv=64,
            v_granularity="per_block",
            p_granularity="per_row",
            backward="int8",
        ),
    )
}


def get_quant(quant: str | AttentionQuant | None) -> AttentionQuant | None:
    """Looks a variant up by name.

    Args:
      quant: None (full precision), a name in `QUANTS`, or an `AttentionQuant`.

    Returns:
      An `AttentionQuant`, or None.

    Raises:
      ValueError: the name is unknown or the type is wrong.

    >>> get_quant("sage1").pv
    'half'
    """
    if quant is None or isinstance(quant, AttentionQuant):
        return quant
    if not isinstance(quant, str) or quant not in QUANTS:
        names = ", ".join(repr(name) for name in QUANTS)
        raise ValueError(f"quant must be None, an AttentionQuant or one of {names}; got {quant!r}")
    return QUANTS[quant]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sizes that change speed and memory but not the result beyond rounding.

    Args:
      block_kv: keys per step of the chunked XLA implementation, tokens; None chooses from the
        shapes. Quantised variants take their tile from `AttentionQuant.block_kv` instead, and a
        `BlockMask` brings its own tiles.

    Raises:
      ValueError: a size below 1.
    """

    block_kv: int | None = None

    def __post_init__(self):
        if self.block_kv is not None and self.block_kv < 1:
            raise ValueError(f"config: block_kv must be at least 1 token; got {self.block_kv}")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Everything about a call that is known before it runs.

    Args:
      batch: B.
      q_len: T, tokens.
      kv_len: S, tokens.
      num_heads: N.
      num_kv_heads: K, divides N.
      head_dim: H.
      dtype: name of the dtype of query and output.
      scale: factor on the logits.
      soft_cap: bound of the logits, ``cap * tanh(x / cap)``, or None.
      quant: variant, or None for full precision.
      quantized_key: the key came as a QTensor and is used as it is.
      quantized_value: the value came as a QTensor and is used as it is.
      has_bias: a bias is added to the logits.
      has_sinks: every head has a sink logit.
      mask_kinds: names of the rules in use, for messages.
      tiles: (block_q, block_kv) of a `BlockMask`, tokens, or None.
      deterministic: repeated runs must give the same bits.
    """

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    scale: float
    soft_cap: float | None = None
    quant: AttentionQuant | None = None
    quantized_key: bool = False
    quantized_value: bool = False
    has_bias: bool = False
    has_sinks: bool = False
    mask_kinds: tuple[str, ...] = ()
    tiles: tuple[int, int] | None = None
    deterministic: bool = False

    @property
    def groups(self) -> int:
        """G, query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def unsupported_reason(spec: AttentionSpec, device: Device, implementation: str) -> str | None:
    """Why an implementation cannot serve a call, or None when it can.

    Args:
      spec: the call.
      device: the device it would run on.
      implementation: "mosaic", "xla" or "reference".

    Returns:
      One sentence, or None.

    >>> from pallas_kernels._device import Device
    >>> spec = AttentionSpec(1, 8, 8, 2, 2, 16, "float32", 0.25)
    >>> unsupported_reason(spec, Device("cpu", "cpu"), "xla") is None
    True
    """
    reason = _unsupported_anywhere(spec, implementation)
    if reason is not None:
        return reason
    if implementation != "mosaic":
        on_gpu = spec.deterministic and device.platform == "gpu"
        return None if not on_gpu or xla_is_deterministic() else ANY_ORDER
    if device.platform != "gpu":
        return (
            f"the Mosaic GPU kernel needs an NVIDIA GPU (sm90); this device is a {device.platform}"
        )
    if device.compute_capability is not None and device.compute_capability[0] != 9:
        return f"the Mosaic GPU kernel is written for sm90; {device.kind} is {device.sm}"
    from pallas_kernels.ops.attention import mosaic_sm90  # needs Mosaic: not at import time

    return mosaic_sm90.unsupported_reason(spec)


def _unsupported_anywhere(spec: AttentionSpec, implementation: str) -> str | None:
    """Limits that do not depend on the device."""
    quant = spec.quant
    if quant is None:
        return None
    if quant.backward == "int8" and (spec.has_bias or spec.soft_cap is not None):
        what = "bias" if spec.has_bias else "logits_soft_cap"
        return f"{quant.name} has an INT8 backward, which serves no {what}; use quant='sage2'"
    tiles = None if implementation == "reference" else spec.tiles
    if quant.pv == "nvfp4" and tiles is not None and tiles[1] % 16:
        return (
            f"{quant.name} quantises P in groups of 16 keys, so block_kv of the BlockMask must be "
            f"a multiple of 16; it is {tiles[1]}"
        )
    return None


def notes(spec: AttentionSpec, implementation: str) -> tuple[str, ...]:
    """What a user should know about the chosen implementation, for `explain`.

    Args:
      spec: the call.
      implementation: the chosen one.

    Returns:
      Sentences, possibly none.
    """
    said = []
    if implementation == "mosaic":
        if spec.quant is not None:
            said.append(
                "scales are at least as fine as the variant asks: Q per row, K eight per tile of "
                "keys (by key index modulo 8), V per channel"
            )
        said.append(_gradient_note(spec))
        if spec.quant is not None and spec.quant.backward == "int8":
            said.append(
                "the gradient's kernels take head sizes up to 128 and rules without arrays; "
                "everything else has that of 'xla'"
            )
            said.append("dS has a scale per row there, not one per tile; dV and dK are in 16 bits")
            if spec.quant.pv == "int8":
                said.append("P V is in 16 bits, finer than the INT8 of the variant")
            said.append("on an H200 forward and backward take about as long as in 16 bits")
    elif spec.quant is not None:
        said.append(
            f"{spec.quant.name} is emulated: values have the precision of the variant, the "
            "arithmetic is that of float32, so expect no speed-up"
        )
        said.append(_gradient_note(spec))
        if not spec.quant.two_level:
            said.append("two_level=False changes nothing here: accumulation is always float32")
    elif implementation == "reference":
        said.append("materialises the logits: memory grows with T*S")
    if spec.tiles is not None and (implementation == "reference" or spec.has_bias):
        why = "with a bias" if spec.has_bias else "the reference"
        said.append(f"{why}: tiles that the BlockMask skips are computed and masked")
    return tuple(said)


def _gradient_note(spec: AttentionSpec) -> str:
    if spec.quant is not None and spec.quant.backward == "int8":
        return "the gradient is that of SageBwd: INT8 products except dO V^T"
    return "the gradient is the unquantised flash backward, from the saved log-sum-exp"

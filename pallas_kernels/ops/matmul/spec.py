# SPDX-License-Identifier: Apache-2.0
"""Static facts of a matrix product, and who can serve it."""

from __future__ import annotations

import dataclasses

from pallas_kernels._device import Device

IMPLEMENTATIONS = ("mosaic", "xla", "reference")
# Hopper's fp8 units keep about 14 bits of a sum; DeepSeek-V3 promotes it after 128 values of k.
BLOCK_K = 128

# What the sm90 kernels read: codes and scales by dtype, and the inputs of one product of the
# tensor core, which share a scale.
CODES = {"float4_e2m1fn": "e2m1", "int4": "int4"}
FP8_KINDS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
WIDE_CODES = {"int8": "int8"} | FP8_KINDS
SCALES = {"float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0", "float32": "float32"}
UNIT = 16
# INT8 with INT8: to here few rows' kernel, to there XLA, beyond it many rows' kernel. A token of 16
# rows took 0.55 ms with XLA and 0.69 with the kernel (experiments/finetune, inference).
_XLA_INT8_ROWS, _INT8_ROWS = 8, 64
# Largest magnitude of a code, in units in which all codes are integers, and these units.
CODE_RANGE = {"float4_e2m1fn": (12, 0.5), "int4": (8, 1.0)}
_PADDED = "the sm90 kernel takes weights whose outputs are stored without padding"
FEW_ROWS = 32  # up to here the kernel that reads the weights once for every 16 rows

# Why implementation=None takes "xla" where there are several devices and no `jax.shard_map`.
SEVERAL_DEVICES = (
    "XLA splits a product over several devices, the sm90 kernel runs on one: call it in "
    "jax.shard_map or with implementation='mosaic'"
)

# Bits of one code by dtype; a packed operand stores uint8 and has 4.
_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int8": 8}
_BITS |= {"float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclasses.dataclass(frozen=True)
class OperandSpec:
    """What is known about one operand before the call runs.

    Args:
      dtype: name of the dtype of the array, or of the codes of a QTensor.
      quantized: True for a QTensor.
      k_tiles: scales along the contracted axis; 1 when one scale covers it.
      plain: no zero point and no padding.
      packed: dtype of the codes inside, where two of them share a byte; else None.
      packed_axis: the axis of these pairs, counted from the end.
      scale_dtype: name of the dtype of the scales of a QTensor.
      n_tiles: scales along the other axis.
      stored_k: contracted length with padding.
      zero_point: codes have zero points.
      scale_steps: scales of a column are multiples of the largest over this; None if not.
      stored_n: length of the other axis with padding.
    """

    dtype: str
    quantized: bool = False
    k_tiles: int = 1
    plain: bool = True
    packed: str | None = None
    packed_axis: int | None = None
    scale_dtype: str | None = None
    n_tiles: int = 1
    stored_k: int = 0
    zero_point: bool = False
    scale_steps: int | None = None
    stored_n: int = 0

    @property
    def steps(self) -> int | None:
        """``scale_steps``; one scale along k is the largest of its column."""
        return 1 if self.k_tiles == 1 else self.scale_steps

    @property
    def group(self) -> int:
        """Inputs that share a scale, padding included."""
        return self.stored_k // max(self.k_tiles, 1)

    @property
    def code_dtype(self) -> str:
        """Name of the dtype of one code, unpacked."""
        return self.packed or self.dtype

    @property
    def bits(self) -> int:
        """Bits of one value: 4 or 8 where it is quantised, else 16 (kernels load no wider ones)."""
        return _BITS.get(self.code_dtype, 16) if self.quantized else 16

    @property
    def kind(self) -> str | None:
        """Which low-precision product the codes can enter: "int8", "fp8" or None."""
        return self.code_kind if self.k_tiles == 1 else None

    @property
    def code_kind(self) -> str | None:
        """What the codes are, "int8" or "fp8", whatever the scales; None if not plain codes."""
        if not (self.quantized and self.plain):
            return None
        return {
            "int8": "int8",
            "int4": "int8",
            "float8_e4m3fn": "fp8",
            "float8_e5m2": "fp8",
        }.get(self.code_dtype)


@dataclasses.dataclass(frozen=True)
class MatmulSpec:
    """Everything about a product that is known before it runs.

    Args:
      m: rows of the left operand, leading axes folded in.
      n: columns of the right operand.
      k: contracted length.
      lhs: the left operand.
      rhs: the right operand.
      out_dtype: name of the dtype of the result.
    """

    m: int
    n: int
    k: int
    lhs: OperandSpec
    rhs: OperandSpec
    out_dtype: str

    def with_rows(self, m: int) -> MatmulSpec:
        """The same product of another number of rows."""
        return dataclasses.replace(self, m=m)

    @property
    def scheme(self) -> str | None:
        """Bits of weights and activations: "w4a16", "w4a8", "w8a8", ...; None for plain weights."""
        return f"w{self.rhs.bits}a{self.lhs.bits}" if self.rhs.quantized else None

    @property
    def direct(self) -> str | None:
        """ "int8" or "fp8" when the codes are multiplied themselves, else None."""
        return self.lhs.kind if self.lhs.kind == self.rhs.kind else None

    @property
    def widened(self) -> bool:
        """Whether an sm90 kernel widens packed 4-bit weights, for rows of 16 or 8 bits."""
        return self.scheme in ("w4a16", "w4a8")

    @property
    def few(self) -> bool:
        """Whether the sm90 kernel that reads the weights once for few rows takes the product."""
        return self.m <= FEW_ROWS and (self.widened or _eight_bit_reason(self) is None)

    @property
    def integer(self) -> bool:
        """Whether packed 4-bit weights are INT8 numbers, up to a factor of their output."""
        rhs = self.rhs
        return (
            (self.scheme, self.lhs.kind) == ("w4a8", "int8")
            and rhs.packed in CODE_RANGE
            and rhs.steps is not None
            and CODE_RANGE[rhs.packed][0] * rhs.steps <= 127
            and (rhs.k_tiles == 1 or rhs.group in (32, 64) or rhs.group % BLOCK_K == 0)
        )

    @property
    def block_scaled(self) -> bool:
        """Whether fp8 codes are multiplied tile by tile of k, each sum scaled into float32."""
        tiles = self.lhs.k_tiles
        return (
            self.lhs.code_kind == self.rhs.code_kind == "fp8"
            and 1 < tiles == self.rhs.k_tiles
            and self.k % (tiles * BLOCK_K) == 0
        )


def unsupported_reason(spec: MatmulSpec, device: Device, implementation: str) -> str | None:
    """Why an implementation cannot serve a product, or None when it can.

    Args:
      spec: the call.
      device: the device it would run on.
      implementation: "mosaic", "xla" or "reference".

    Returns:
      One sentence, or None.
    """
    if implementation != "mosaic":
        return None
    if device.platform != "gpu":
        return (
            f"the Mosaic GPU kernel needs an NVIDIA GPU (sm90); this device is a {device.platform}"
        )
    if device.compute_capability is not None and device.compute_capability[0] != 9:
        return f"the Mosaic GPU kernel is written for sm90; {device.kind} is {device.sm}"
    if spec.scheme is None:
        return "a Mosaic GPU kernel is for quantised weights; jax.numpy.matmul serves plain ones"
    if spec.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"the sm90 kernel writes 16- and 32-bit floats; got {spec.out_dtype}"
    if not (spec.m and spec.n and spec.k):
        return f"the sm90 kernel takes no empty products; got {spec.m} x {spec.k} x {spec.n}"
    if spec.block_scaled:
        return _fp8_reason(spec)
    if spec.scheme == "w8a8" and spec.direct is not None:
        return None
    if spec.widened:
        return _four_bit_reason(spec)
    if spec.scheme in ("w8a16", "w8a8"):
        return _eight_bit_reason(spec)
    return f"a Mosaic GPU kernel for {spec.scheme} is not part of this version"


def _fp8_reason(spec: MatmulSpec) -> str | None:
    """Why the sm90 kernel does not serve a product of fp8 codes with tiles of k, or None."""
    lhs, rhs = spec.lhs, spec.rhs
    if lhs.k_tiles * BLOCK_K != spec.k:
        return f"the sm90 kernel takes one scale per {BLOCK_K} of k; got {lhs.k_tiles} of {spec.k}"
    if lhs.n_tiles != spec.m or (rhs.n_tiles != spec.n and rhs.n_tiles * BLOCK_K != spec.n):
        return (
            f"the sm90 kernel takes scales per row of lhs, and per column or {BLOCK_K} columns of "
            f"rhs; got {lhs.n_tiles} for {spec.m} rows and {rhs.n_tiles} for {spec.n} columns"
        )
    if spec.n % 64 or spec.m % 8:
        return (
            "the sm90 kernel takes rows in multiples of 8 and columns of 64; "
            f"got {spec.m} and {spec.n}"
        )
    return None


def _activations_reason(lhs: OperandSpec) -> str | None:
    """Why the sm90 kernels that widen weights do not take activations, or None."""
    if lhs.quantized and lhs.kind is None:
        return (
            "the sm90 kernel takes bfloat16 activations, or INT8 or FP8 with one scale per row and "
            "no zero point"
        )
    if not lhs.quantized and lhs.dtype != "bfloat16":
        return f"the sm90 kernel takes bfloat16 or 8-bit activations; got {lhs.dtype}"
    return None


def _eight_bit_reason(spec: MatmulSpec) -> str | None:
    """Why the sm90 kernel for few rows does not serve a product of 8-bit weights, or None."""
    rhs = spec.rhs
    if (reason := _activations_reason(spec.lhs)) is not None:
        return reason
    if spec.m > FEW_ROWS:
        kinds = (
            "" if spec.scheme != "w8a8" else " but INT8 or FP8 with one scale per row and output"
        )
        return f"the sm90 kernel for {spec.scheme}{kinds} takes up to {FEW_ROWS} rows; got {spec.m}"
    if rhs.code_dtype not in WIDE_CODES or rhs.zero_point or rhs.scale_dtype not in SCALES:
        return (
            "the sm90 kernel takes INT8 or FP8 weights with float32, e8m0 or e4m3 scales and no "
            "zero points"
        )
    if rhs.stored_n != spec.n:
        return _PADDED
    if rhs.n_tiles != spec.n or (rhs.k_tiles != 1 and rhs.group % UNIT):
        return (
            f"the sm90 kernel takes one scale per output and multiple of {UNIT} inputs; got "
            f"{rhs.n_tiles} for {spec.n} outputs, and {rhs.group} inputs"
        )
    return None


def _four_bit_reason(spec: MatmulSpec) -> str | None:
    """Why the sm90 kernels do not serve a product of 4-bit weights, or None."""
    rhs = spec.rhs
    if (reason := _activations_reason(spec.lhs)) is not None:
        return reason
    if rhs.packed not in CODES or rhs.packed_axis != -2:
        return "the sm90 kernel takes 4-bit weights packed along the inputs, as pack(0) makes them"
    if rhs.stored_n != spec.n:
        return _PADDED
    if rhs.zero_point or rhs.scale_dtype not in SCALES or rhs.n_tiles != spec.n:
        return (
            "the sm90 kernel takes one float32, e4m3 or e8m0 scale per group of inputs and output, "
            "and no zero points"
        )
    group = rhs.group
    if rhs.k_tiles != 1 and (group % UNIT or (64 % group and group % 64)):
        return f"the sm90 kernel takes groups of 16, 32 or a multiple of 64 inputs; got {group}"
    return None


def unmeasured_reason(spec: MatmulSpec) -> str | None:
    """Why ``implementation=None`` passes over a kernel that could serve a call, or None.

    Args:
      spec: the call.

    Returns:
      One sentence, or None.
    """
    if spec.scheme != "w8a8" or spec.m > _INT8_ROWS:
        return None
    if spec.few and (spec.direct != "int8" or spec.m <= _XLA_INT8_ROWS):
        return None
    if spec.direct == "int8" and spec.m > _XLA_INT8_ROWS:
        return (
            f"XLA multiplies {_XLA_INT8_ROWS + 1} to {_INT8_ROWS} INT8 rows faster, got {spec.m}; "
            "implementation='mosaic' runs an sm90 kernel"
        )
    return (
        f"the sm90 kernel for 8-bit weights was measured for more than {_INT8_ROWS} rows, "
        f"got {spec.m}; implementation='mosaic' runs it"
    )


def notes(spec: MatmulSpec, implementation: str) -> tuple[str, ...]:
    """What a user should know about the chosen implementation, for `explain`.

    Args:
      spec: the call.
      implementation: the chosen one.

    Returns:
      Sentences, possibly none.
    """
    if not (spec.lhs.quantized or spec.rhs.quantized):
        return ()
    prefix = "" if spec.scheme is None else f"{spec.scheme}: "
    if implementation == "xla" and spec.direct:
        total = "int32" if spec.direct == "int8" else "float32"
        return (f"{prefix}the {spec.direct} codes are multiplied directly and summed in {total}",)
    if implementation == "xla" and spec.block_scaled:
        size = spec.k // spec.lhs.k_tiles
        return (
            f"{prefix}the fp8 codes are multiplied directly, {size} of k at a time, and each sum "
            "is scaled and added in float32",
        )
    if implementation == "xla":
        why = (
            "both operands must be QTensors of one kind with one scale along k, without zero point"
        )
        return (f"{prefix}operands are dequantised before the product: for a direct one {why}",)
    if implementation == "mosaic" and spec.block_scaled:
        return (f"{prefix}the fp8 codes are multiplied, 128 of k at a time, and scaled in float32",)
    if implementation == "mosaic" and not spec.few and spec.integer:
        return (
            f"{prefix}the weights are read packed, become INT8 numbers in registers without a "
            "rounding, and are summed in int32",
        )
    if implementation == "mosaic" and (spec.few or spec.widened):
        how = "packed" if spec.widened else "in 8 bits"
        where = "in registers" if spec.few else "in registers, to bfloat16,"
        return (f"{prefix}the weights are read {how} and widened {where} within the product",)
    if implementation == "mosaic":
        total = "int32" if spec.direct == "int8" else "float32, 128 of k at a time"
        return (f"{prefix}the {spec.direct} codes are multiplied directly and summed in {total}",)
    return (f"{prefix}operands are dequantised to float32 before the product",)

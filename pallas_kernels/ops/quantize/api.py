"""Public entry: arrays to QTensor and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._device import current_device
from pallas_kernels.formats.block_format import BlockFormat, get_format
from pallas_kernels.formats.counter_random import is_counter_key
from pallas_kernels.formats.hadamard import rht
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.quantize import reference, xla
from pallas_kernels.ops.quantize import spec as spec_lib
from pallas_kernels.ops.quantize.spec import QuantizeSpec, make_spec, unsupported_reason

_IMPLEMENTATIONS = {"xla": xla.quantize, "reference": reference.quantize}


def quantize(
    x: jax.Array,
    qtype: str | BlockFormat,
    *,
    axis: int | tuple[int, ...] | None = -1,
    tile: int | tuple[int, ...] | str | None = "default",
    rounding: str = "nearest",
    key: jax.Array | None = None,
    scale_rule: str | None = None,
    overrange: float = 1.0,
    two_level: bool | None = None,
    scale_min: float | None = None,
    asymmetric: bool = False,
    implementation: str | None = None,
) -> QTensor:
    """Quantises an array: one scale per tile, one low-precision code per value.

        s = scale rule(overrange · max|x| over the tile),   code = round(x / s),   saturated

    Asymmetric integers use s = (max - min) / (2^bits - 1) and a float zero point instead, so that
    both ends of a tile are codes; a tile far from zero keeps its resolution, but 0 is a code only
    by chance.

    A tile that does not divide its axis is completed with zeros; the codes keep them, and ``shape``
    and ``dequantize`` leave them out. (An asymmetric last tile therefore includes 0 in its range.)
    A tile of zeros gives zeros. NaN or inf in a tile makes its scale, and so the whole tile, NaN;
    other tiles are not touched. No gradient flows; ``fake_quantize`` has one.

    Args:
        x: float32, bfloat16, float16 (or float64, used as float32) array of any shape.
        qtype: ``"int8"``, ``"int4"``, ``"fp8_e4m3"``, ``"fp8_e5m2"``, ``"mxfp8"``, ``"mxfp4"``,
            ``"nvfp4"``, ``"mxfp4_int8"``, ``"int4_int8"``, a structural name or a
            ``BlockFormat``, see ``formats.get_format``.
        axis: axes along which values share a scale, as a rule the contraction axis. ``None``: one
            scale for the tensor.
        tile: values per scale along ``axis``: a number, one per axis, ``None`` for the whole axis,
            or ``"default"``: 16 for nvfp4, 32 for mx, 128 for int4_int8, the whole axis for the
            others.
            ``axis=(-2, -1), tile=(16, 16)`` gives square tiles.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (unbiased, needs ``key``).
        key: ``jax.random`` key; 23 random bits per value.
        scale_rule: ``"nearest"``, or a power of two by ``"floor"``, ``"ceil"`` or ``"qwix"``;
            ``None`` for the format's own (floor for mx, nearest for the others).
        overrange: factor >= 1 on the largest magnitude. 17/16 undoes the shrinking of e4m3 scales,
            so that nothing saturates and stochastic rounding stays unbiased.
        two_level: whether a float32 tensor scale brings the block scales into range; ``None`` for
            the format's own (nvfp4: yes).
        scale_min: lower clamp of the scale; ``None`` for the smallest value of its type (2^-9 for
            e4m3).
        asymmetric: whether an integer format stores a zero point.
        implementation: ``None`` or ``"xla"``; ``"reference"`` is the slow oracle.

    Returns:
        ``QTensor``. ``scale`` has the rank of ``x`` and ceil(length / tile) entries along every
        axis.

    Raises:
        ValueError: ``x`` is not floating, a key is missing or unused, or a static argument is
            wrong.
        NotImplementedError: the implementation does not serve this.

    >>> qt = quantize(jnp.float32([[0.0, 1.0, -3.0, 6.0]]), "mxfp4")
    >>> qt.dequantize().tolist(), qt.shape, qt.scale.shape
    ([[0.0, 1.0, -3.0, 6.0]], (1, 4), (1, 1))

    References: OCP Microscaling v1.0; Pretraining LLMs with NVFP4 (arXiv:2509.25149), appendix B;
    FP4 All the Way (arXiv:2505.19115), section 3; KIVI (arXiv:2402.02750), section 3 (asymmetric).
    """
    x, spec, name = _resolve(
        x,
        qtype,
        key,
        implementation,
        axis=axis,
        tile=tile,
        rounding=rounding,
        scale_rule=scale_rule,
        overrange=overrange,
        two_level=two_level,
        scale_min=scale_min,
        asymmetric=asymmetric,
    )
    return _IMPLEMENTATIONS[name](jax.lax.stop_gradient(x), key, spec)


def quantize_fp8_both(
    x: jax.Array,
    qtype: str,
    scale: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FP8 codes of a matrix under a given scale, as it lies and transposed; no gradient.

        code = round(x / scale), saturated, ties to even

    An 8-bit product wants the contracted axis of both operands last, so a tensor that enters two
    products is needed in both orders. The Hopper kernel ("mosaic") writes them from one read; it is
    not chosen by itself on several devices, see ``fake_quantize_both``.

    Args:
        x: floating [rows, columns]; bfloat16 or float16, in multiples of 16, for the kernel.
        qtype: "fp8_e4m3" or "fp8_e5m2".
        scale: float32 scalar.
        implementation: None, "mosaic" or "xla".

    Returns:
        Codes [rows, columns] and [columns, rows]; and max|x|, a float32 scalar, which costs nothing
        more here and is what delayed scaling remembers.

    Raises:
        ValueError: another format, or ``x`` is not a floating matrix.
        NotImplementedError: the named implementation does not serve this.

    >>> codes, turned, top = quantize_fp8_both(jnp.ones((2, 3)), "fp8_e4m3", jnp.float32(0.5))
    >>> codes.tolist(), turned.shape, float(top)
    ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], (3, 2), 1.0)
    """
    if qtype not in ("fp8_e4m3", "fp8_e5m2"):
        raise ValueError(f"qtype must be 'fp8_e4m3' or 'fp8_e5m2', got {qtype!r}")
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating matrix, got {x.dtype} {list(x.shape)}")
    if implementation not in (None, "mosaic", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic' or 'xla', got {implementation!r}")
    x, scale = jax.lax.stop_gradient((x, jnp.asarray(scale, jnp.float32)))
    reason = spec_lib.cast_reason(x.shape, str(x.dtype), current_device())
    if implementation == "mosaic" and reason is not None:
        raise NotImplementedError(reason)
    reason = reason or spec_lib.unmeasured_reason(str(x.dtype))
    by_itself = implementation is None and reason is None and jax.device_count() == 1
    if implementation == "mosaic" or by_itself:
        from pallas_kernels.ops.quantize import matrix  # needs Mosaic: not at import time

        return matrix.cast_fp8(x, scale, get_format(qtype).element)
    return xla.quantize_fp8_both(x, get_format(qtype).element_type, scale)


def dequantize(qt: QTensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The value of a QTensor as a plain array; see ``QTensor.dequantize``.

    Args:
        qt: quantised array, packed or not.
        dtype: floating dtype of the result.

    Returns:
        Array of ``dtype``, shape ``qt.shape``.

    Raises:
        ValueError: ``dtype`` is not floating, or ``qt`` is not a QTensor.

    >>> dequantize(quantize(jnp.ones(3), "int8")).tolist()
    [1.0, 1.0, 1.0]
    """
    if not isinstance(qt, QTensor):
        raise ValueError(f"qt must be a QTensor, got {type(qt).__name__}")
    return qt.dequantize(dtype)


def fake_quantize(x: jax.Array, qtype: str | BlockFormat, **options) -> jax.Array:
    """Quantises and dequantises, with the straight-through gradient d out / d x = 1.

    Args:
        x: floating array.
        qtype: format, as in ``quantize``.
        **options: keyword arguments of ``quantize``.

    Returns:
        Array of the shape and dtype of ``x``: exactly ``dequantize(quantize(x, ...), x.dtype)``.
        ``implementation="mosaic"`` is a Hopper kernel for matrices, see ``fake_quantize_both``.

    Raises:
        ValueError, NotImplementedError: as ``quantize``.

    >>> fake_quantize(jnp.float32([0.9, 6.0]), "mxfp4").tolist()
    [1.0, 6.0]
    >>> jax.grad(lambda x: fake_quantize(x, "mxfp4").sum())(jnp.float32([0.9, 9.0])).tolist()
    [1.0, 1.0]

    References: Bengio et al. 2013 (arXiv:1308.3432), straight-through estimator.
    """
    key, implementation = options.pop("key", None), options.pop("implementation", None)
    x, spec, name = _resolve(x, qtype, key, implementation, in_place=True, **options)
    if name == "mosaic":
        request = (spec, key, None)
        along_last = spec.tile[1] > 1
        requests = (request, None) if along_last else (None, request)
        from pallas_kernels.ops.quantize import matrix  # needs Mosaic: not at import time

        (quantized,) = matrix.fake_quantize(jax.lax.stop_gradient(x), *requests)
    elif name == "xla":
        quantized = xla.fake_quantize(jax.lax.stop_gradient(x), key, spec)
    else:
        quantized = quantize(x, qtype, key=key, implementation=implementation, **options)
        quantized = quantized.dequantize(x.dtype)
    return _straight_through(x, jax.lax.stop_gradient(quantized))


def fake_quantize_both(
    x: jax.Array,
    qtype: str | BlockFormat,
    last: Mapping[str, Any],
    first: Mapping[str, Any],
    *,
    signs: tuple[int, ...] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rounds a matrix twice, with blocks along its last and along its first axis; no gradient.

    That is what a training step needs of each operand, as each enters two products. The Hopper
    kernel ("mosaic") does both from one read. Its numbers are those of ``fake_quantize``, random
    ones too, which it draws from keys of ``formats.counter_random``; the scale of a tensor that
    holds NaN or inf may differ. ``None`` does not choose it on several devices, where XLA cuts the
    plain program into pieces. Under ``vmap`` it runs once for each entry.

    Args:
        x: floating [rows, columns].
        qtype: format, as in ``quantize``.
        last: keyword arguments of ``quantize`` for blocks along the last axis, such as
            ``{"rounding": "stochastic", "key": key}``, without ``axis``.
        first: likewise for blocks along the first axis.
        signs: 16 signs of a Hadamard transform along the first axis before blocks along it are
            rounded, see ``rht``; or None.
        implementation: None, "mosaic" or "xla".

    Returns:
        Two arrays of the shape and dtype of ``x``; the second one is transformed if ``signs`` are
        given.

    Raises:
        ValueError: an argument is wrong, or ``x`` is not a matrix.
        NotImplementedError: the named implementation does not serve this.

    >>> x = jnp.arange(256.0).reshape(16, 16)
    >>> rows, columns = fake_quantize_both(x, "nvfp4", {}, {})
    >>> bool((columns == fake_quantize(x, "nvfp4", axis=0)).all())
    True

    References: Pretraining LLMs with NVFP4 (arXiv:2509.25149), sections 4.2 to 4.4.
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if x.ndim != 2:
        raise ValueError(f"x must be [rows, columns], got shape {list(x.shape)}")
    requests, names = [], []
    for axis, options in ((-1, last), (0, first)):
        options = dict(options)
        key = options.pop("key", None)
        how = {"in_place": True, "axis": axis, **options}
        _, spec, name = _resolve(x, qtype, key, implementation, **how)
        requests.append((spec, key, None if axis else signs))
        names.append(name)
    if names == ["mosaic", "mosaic"]:
        from pallas_kernels.ops.quantize import matrix  # needs Mosaic: not at import time

        return tuple(matrix.fake_quantize(x, *requests))
    turned = x if signs is None else rht(x, 0, len(signs), signs)
    values = [xla.fake_quantize(value, request[1], request[0])
              for value, request in zip((x, turned), requests, strict=True)]  # fmt: skip
    return tuple(values)


@jax.custom_jvp
def _straight_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def _resolve(
    x, qtype, key, implementation, in_place=False, **options
) -> tuple[jax.Array, QuantizeSpec, str]:
    """The array, its static facts and the name of the implementation; raises for bad arguments.

    ``in_place`` asks for values, not for codes: that is what the Mosaic kernel gives.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got dtype {x.dtype}")
    spec = make_spec(x.shape, qtype, **options)
    _check_key(key, spec)
    name = "xla" if implementation is None else implementation
    if in_place and implementation in (None, "mosaic"):
        reason = spec_lib.matrix_reason(
            spec, x.shape, str(x.dtype), key is None or is_counter_key(key), current_device()
        )
        if implementation is None:
            reason = reason or spec_lib.unmeasured_reason(str(x.dtype), spec.two_level)
            alone = jax.device_count() == 1
            return x, spec, "mosaic" if reason is None and alone else "xla"
        if reason is None:
            return x, spec, "mosaic"
        raise NotImplementedError(reason)
    if (reason := unsupported_reason(name, spec)) is not None:
        raise NotImplementedError(reason)
    return x, spec, name


def _check_key(key: jax.Array | None, spec: QuantizeSpec) -> None:
    if spec.rounding == "stochastic" and key is None:
        raise ValueError("rounding='stochastic' needs a key, such as jax.random.key(0); got None")
    if spec.rounding == "nearest" and key is not None:
        raise ValueError("key is used by rounding='stochastic' only; got one with 'nearest'")

"""Block formats: an element type, the tile one scale covers, and how that scale is chosen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from pallas_kernels.formats.number_types import (
    FLOAT32_MIN_NORMAL,
    IntType,
    NumberType,
    float_exponent,
    number_type,
    power_of_two,
    true_divide,
)
from pallas_kernels.formats.rounding import round_to

SCALE_RULES = ("nearest", "floor", "ceil", "qwix")
_ELEMENTS = ("int4", "int8", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
_NAME = re.compile(
    r"(?P<element>int[48]|e\dm\d)_b(?P<block>axis|[1-9]\d*)_(?P<scale>float32|bfloat16|float16|e\dm\d)"
    r"(_(?P<rule>floor|ceil|qwix|nearest))?(?P<two_level>_x2)?(_s(?P<steps>[1-9]\d*))?"
)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """How a block of values becomes element codes and one shared scale.

    value = code · scale (· tensor_scale when ``two_level``).

    Args:
        element: type of a code: int4, int8, e2m1, e2m3, e3m2, e4m3 or e5m2.
        block: values per scale along a quantised axis; ``None`` means the whole axis.
        scale: type of the scale: float32, bfloat16, float16, e8m0, e4m3 or any eXmY. A type that
            jax does not have is stored as float32 whose values lie on its grid.
        scale_rule: ``"nearest"`` rounds amax / max to the scale type. ``"floor"``, ``"ceil"`` and
            ``"qwix"`` give a power of two, see ``scale_from_amax``. ``None`` means ``"floor"`` for
            e8m0 and ``"nearest"`` otherwise.
        two_level: whether a float32 scale per tensor brings the block scales into the range of
            their type.
        scale_steps: scales along the axes whose tiles have more than one value are multiples of the
            largest over this number, see ``stepped_scales``; ``None`` for no such rule. For float32
            and e8m0 scales.

    Raises:
        ValueError: an argument is none of the above, or ``two_level`` is asked of a scale type that
            has the range of float32 already.

    >>> BlockFormat("e2m1", 32, "e3m4", two_level=True).name
    'e2m1_b32_e3m4_x2'
    >>> BlockFormat("e2m1", 16, "e4m3", two_level=True).name
    'nvfp4'

    References: OCP Microscaling v1.0, section 6; arXiv:2505.19115, section 3 (scale and block
    study).
    """

    element: str
    block: int | None = None
    scale: str = "float32"
    scale_rule: str | None = None
    two_level: bool = False
    scale_steps: int | None = None

    def __post_init__(self):
        if self.element not in _ELEMENTS:
            raise ValueError(f"element must be one of {_ELEMENTS}, got {self.element!r}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1 or None, got {self.block}")
        if isinstance(number_type(self.scale), IntType):
            raise ValueError(f"scale must be a float type, got {self.scale!r}")
        if self.scale_rule is None:
            object.__setattr__(self, "scale_rule", _default_rule(self.scale))
        check_scale_rule(self.scale_rule)
        check_two_level(self.scale, self.two_level)
        check_scale_steps(self.scale, self.scale_steps)

    @property
    def element_type(self) -> NumberType:
        """The type of one code."""
        return number_type(self.element)

    @property
    def scale_type(self) -> NumberType:
        """The type of one scale."""
        return number_type(self.scale)

    @property
    def name(self) -> str:
        """Name that ``get_format`` understands: a registered one, or element_b<block>_scale."""
        registered = [name for name, known in FORMATS.items() if known == self]
        if registered:
            return registered[0]
        rule = "" if self.scale_rule == _default_rule(self.scale) else f"_{self.scale_rule}"
        block = "axis" if self.block is None else self.block
        steps = "" if self.scale_steps is None else f"_s{self.scale_steps}"
        levels = "_x2" if self.two_level else ""
        return f"{self.element}_b{block}_{self.scale}{rule}{levels}{steps}"


#: Formats by name; the family files fill it.
FORMATS: dict[str, BlockFormat] = {}


def register(name: str, block_format: BlockFormat) -> BlockFormat:
    """Adds a named format; returns it.

    Args:
        name: name for ``qtype``.
        block_format: the format.

    Returns:
        ``block_format``.

    Raises:
        ValueError: the name is taken by another format.

    >>> register("int8", BlockFormat("int8")).name
    'int8'
    """
    if FORMATS.setdefault(name, block_format) != block_format:
        raise ValueError(f"format {name!r} is registered already, as {FORMATS[name]}")
    return block_format


def get_format(qtype: str | BlockFormat) -> BlockFormat:
    """Finds a format by name.

    Args:
        qtype: a registered name, a structural name such as ``"e2m1_b32_e3m4_x2"``
            (element, block or ``axis``, scale, optional scale rule, ``x2`` for two levels, ``s8``
            for eight ``scale_steps``), or a ``BlockFormat``, which is returned as it is.

    Returns:
        The format.

    Raises:
        ValueError: no such format.

    >>> get_format("mxfp4").block, get_format("e4m3_b128_float32_ceil").scale_rule
    (32, 'ceil')
    """
    if isinstance(qtype, BlockFormat):
        return qtype
    return _format_by_name(qtype)


@functools.cache
def _format_by_name(name: str) -> BlockFormat:
    if name in FORMATS:
        return FORMATS[name]
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"unknown format {name!r}: expected one of {', '.join(FORMATS)}, "
            "or element_b<block>_scale such as 'e2m1_b32_e3m4'"
        )
    block = None if match["block"] == "axis" else int(match["block"])
    steps = match["steps"] and int(match["steps"])
    return BlockFormat(
        match["element"], block, match["scale"], match["rule"], match["two_level"] is not None,
        steps,
    )  # fmt: skip


def _default_rule(scale: str) -> str:
    return "floor" if scale == "e8m0" else "nearest"


def check_scale_rule(scale_rule: str) -> None:
    """Raises ValueError unless ``scale_rule`` is one of ``SCALE_RULES``.

    Args:
        scale_rule: name to check.

    Raises:
        ValueError: unknown rule.

    >>> check_scale_rule("floor")
    """
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule must be one of {SCALE_RULES}, got {scale_rule!r}")


def check_two_level(scale: str, two_level: bool) -> None:
    """Raises ValueError if a second level would be useless for this scale type.

    Args:
        scale: name of the scale type.
        two_level: whether a tensor scale is wanted.

    Raises:
        ValueError: ``two_level`` with a scale that has an 8-bit exponent.

    >>> check_two_level("e4m3", True)
    """
    if two_level and number_type(scale).covers_float32:
        raise ValueError(
            "two_level=True needs a scale type narrower than float32, such as e4m3; "
            f"{scale} has the range of float32 already"
        )


def check_scale_steps(scale: str, steps: int | None) -> None:
    """Raises ValueError if scales of a type cannot be multiples of the largest over ``steps``.

    Args:
        scale: name of the scale type.
        steps: how many, or None.

    Raises:
        ValueError: neither float32 nor e8m0, no int from 1 to 2^15, or for e8m0 no power of two.

    >>> check_scale_steps("e8m0", 8)
    """
    if steps is None:
        return
    if scale not in ("float32", "e8m0"):
        raise ValueError(f"scale_steps needs float32 or e8m0 scales, got {scale}")
    is_count = isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= 2**15
    if not is_count or (scale == "e8m0" and steps & (steps - 1)):
        kind = "a power of two" if scale == "e8m0" else "an int"
        raise ValueError(f"scale_steps of {scale} must be {kind} from 1 to 2^15, got {steps!r}")


def scale_from_amax(
    amax: jax.Array,
    element: NumberType,
    scale_type: NumberType,
    rule: str,
    scale_min: float,
    encode: jax.Array | float = 1.0,
) -> jax.Array:
    """Decode scale of a tile from its largest magnitude.

        nearest:  s = round(amax / max · encode)            to the scale type, ties to even
        floor:    s = 2^(floor(log2 amax) - e_max)          OCP; elements may saturate
        ceil:     s = 2^ceil(log2(amax / max))              never saturates
        qwix:     s = 2^floor(log2(amax / max · C)),  C = 12/7 for e2m1, 60/31 for e4m3

    (the last three with amax · encode for amax) and s is clipped to [scale_min, largest scale]. A
    tile of zeros gets 1, or ``scale_min`` if the scale type has a narrower exponent than float32. A
    NaN or infinite amax gives NaN.

    Args:
        amax: float32, >= 0.
        element: type of the codes; max is its largest value and e_max that value's exponent.
        scale_type: type of the scale.
        rule: one of ``SCALE_RULES``.
        scale_min: lower clamp, > 0.
        encode: first-level encode scale of two-level formats.

    Returns:
        float32 array of the shape of ``amax``, on the grid of ``scale_type``.

    >>> e2m1, e8m0 = number_type("e2m1"), number_type("e8m0")
    >>> amax = jnp.float32([1.0, 3.6, 5.9, 7.9])
    >>> scale_from_amax(amax, e2m1, e8m0, "floor", 2.0**-126).tolist()
    [0.25, 0.5, 1.0, 1.0]
    >>> scale_from_amax(amax, e2m1, e8m0, "ceil", 2.0**-126).tolist()
    [0.25, 1.0, 1.0, 2.0]

    References: OCP Microscaling v1.0, section 6.3; google/qwix, numerics of MX scales.
    """
    finite = jnp.isfinite(amax)
    known = jnp.where(finite, amax, 1.0)
    if rule == "nearest":
        scale = round_to(true_divide(known, element.max) * encode, scale_type)
    else:
        exponent = _scale_exponent(known * encode, element, rule)
        scale = power_of_two(jnp.clip(exponent, -126, 127))
    scale = jnp.clip(scale, scale_min, scale_type.max)
    if scale_type.covers_float32:
        scale = jnp.where(amax == 0, 1.0, scale)
    return jnp.where(finite, scale, jnp.nan)


def _scale_exponent(amax: jax.Array, element: NumberType, rule: str) -> jax.Array:
    if rule == "floor":
        return float_exponent(amax) - element.max_exponent
    ratio = true_divide(amax, element.max)
    if rule == "qwix":
        # Halfway to the value after (2 - 2^-m), the largest mantissa, still rounds down to it.
        ulp = 2.0**-element.mantissa_bits
        return float_exponent(ratio * (2 * (2 - ulp) / (2 - ulp / 2)))
    exponent = float_exponent(ratio)
    return exponent + (ratio > power_of_two(jnp.clip(exponent, -126, 127)))


def stepped_scales(
    scale: jax.Array, amax: jax.Array, steps: int, axes: tuple[int, ...]
) -> jax.Array:
    """Raises scales to the next multiple of the largest one along some axes, over ``steps``.

        s = ceil(s · steps / max s) · max s / steps

    and max s for a tile of zeros, and where the steps would be subnormal numbers.

    So ``code · s`` is an integer of few bits times one number. The second level of a weight in two
    levels, of a group below that of its output.

    Args:
        scale: float32, from ``scale_from_amax``; NaN is left out and left as it is.
        amax: largest magnitude of each tile, shape of ``scale``.
        steps: how many; for powers of two a power of two, so that they stay what they are.
        axes: axes of ``scale`` among which scales are compared.

    Returns:
        float32 array of the shape of ``scale``.

    >>> scale = jnp.float32([1.0, 0.3, 0.01])
    >>> stepped_scales(scale, scale, 8, (0,)).tolist()
    [1.0, 0.375, 0.125]

    References: QServe (arXiv:2405.04532), section 4.1 (progressive group quantisation).
    """
    is_used = (amax > 0) & jnp.isfinite(scale)
    top = jnp.max(jnp.where(is_used, scale, 0.0), axis=axes, keepdims=True, initial=0.0)
    top = jnp.where(top == 0, 1.0, top)  # nothing but zeros
    # A quotient may be a rounding above the whole number that it is.
    count = jnp.ceil(true_divide(scale, top) * steps * (1 - 2.0**-20))
    is_top = (amax == 0) | (count >= steps) | (top < steps * FLOAT32_MIN_NORMAL)
    stepped = jnp.where(is_top, top, jnp.maximum(count, 1) * true_divide(top, steps))
    return jnp.where(jnp.isnan(scale), jnp.nan, stepped)


def tensor_encode_scale(amax: jax.Array, element: NumberType, scale_type: NumberType) -> jax.Array:
    """First-level encode scale: maps the largest tile scale to the top of ``scale_type``.

    s_enc = max(element) · max(scale_type) / amax; the stored tensor_scale is 1 / s_enc.

    Args:
        amax: float32, >= 0 and finite: the largest magnitude of the tensor.
        element: type of the codes.
        scale_type: type of the second-level scales.

    Returns:
        float32 array of the shape of ``amax``, at most 2^126; 1 where ``amax`` is 0.

    >>> e2m1, e4m3 = number_type("e2m1"), number_type("e4m3")
    >>> round(float(tensor_encode_scale(jnp.float32(3.6), e2m1, e4m3)), 3)
    746.667

    References: Pretraining LLMs with NVFP4 (arXiv:2509.25149), appendix B.
    """
    encode = (element.max * scale_type.max) / jnp.maximum(amax, FLOAT32_MIN_NORMAL)
    # Above 2^126 the decode scale would be subnormal.
    return jnp.where(amax == 0, 1.0, jnp.minimum(encode, 1 / FLOAT32_MIN_NORMAL))

"""Recipes for low-precision training: which number format each of six operand uses gets.

A linear layer ``z = x w`` takes three matrix products per training step, and each of its tensors
``x`` (activation), ``w`` (weight) and ``d`` (gradient at ``z``) enters two of them:

====================  ==================  ========================
product               contraction axis    points
====================  ==================  ========================
forward ``x w``       K (inputs)          ``fwd_x``, ``fwd_w``
backward ``d wᵀ``     N (outputs)         ``bwd_d``, ``bwd_w``
update ``xᵀ d``       T (tokens)          ``upd_d``, ``upd_x``
====================  ==================  ========================

Blocks that share a scale run along the contraction axis of *that* product, so the same tensor is
quantised twice, differently.
"""

import dataclasses
import math
from typing import Any, Literal

from pallas_kernels.formats import SCALE_RULES, TE_SIGNS, get_format, hadamard_matrix

POINTS = ("fwd_x", "fwd_w", "bwd_d", "bwd_w", "upd_d", "upd_x")

# The order of POINTS is part of the random stream: point i of a layer draws from fold_in(key, i).
_GRANULARITIES = ("contraction", "square", "tensor")


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class OperandQuant:
    """How one operand of one matrix product is quantised; hashable.

    Args:
      format: name of a number format of ``pallas_kernels.formats`` (for example ``"nvfp4"``), a
        block format object of that package, or None to keep the operand as it is.
      rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (unbiased, needs a key).
      granularity: what shares a scale. ``"contraction"``: ``tile`` neighbours along the
        contraction axis. ``"square"``: a ``tile × tile`` square. ``"tensor"``: everything.
      tile: elements per scale; ``"default"`` is the format's own block (16 for nvfp4, 32 for the MX
        formats, the whole axis for the others), None the whole axis.
      scale_rule: how the scale follows from the block maximum, ``"nearest"``, ``"floor"``,
        ``"ceil"`` or ``"qwix"``; None is the format's own.
      overrange: factor ≥ 1 on the block maximum before the scale is made. 17/16 keeps E4M3
        rounding of the scale from clipping the largest element, which would bias stochastic
        rounding.
      two_level: whether a tensor-wide float32 scale stands above the block scales; None is the
        format's own choice (yes for nvfp4).

    Raises:
      ValueError: for an unknown format or option.

    Example:
      >>> OperandQuant("nvfp4", "stochastic", overrange=17 / 16).tile
      'default'

    References:
      arXiv:2505.19115, section 3; arXiv:2509.25149, section 4.
    """

    format: Any = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    granularity: Literal["contraction", "square", "tensor"] = "contraction"
    tile: int | Literal["default"] | None = "default"
    scale_rule: str | None = None
    overrange: float = 1.0
    two_level: bool | None = None

    def __post_init__(self):
        if self.format is not None:
            self._check_format()
        _one_of("rounding", self.rounding, ("nearest", "stochastic"))
        _one_of("granularity", self.granularity, _GRANULARITIES)
        is_count = isinstance(self.tile, int) and not isinstance(self.tile, bool) and self.tile > 0
        if not (self.tile in ("default", None) or is_count):
            raise ValueError(f"tile must be 'default', None or a positive int, got {self.tile!r}")
        if self.granularity == "square" and self.tile is None:
            raise ValueError("granularity 'square' needs a tile size, got tile=None")
        if not 1.0 <= self.overrange <= 2.0:
            raise ValueError(f"overrange must lie in [1, 2], got {self.overrange}")

    def _check_format(self):
        block = get_format(self.format).block  # raises ValueError with the known names
        if self.scale_rule is not None:
            _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        if self.granularity == "square" and self.tile == "default" and block is None:
            raise ValueError(
                f"granularity 'square' needs a tile size, {self.format!r} has no default"
            )


@dataclasses.dataclass(frozen=True)
class RHT:
    """Random Hadamard transform of both weight-gradient operands along the tokens; hashable.

    ``(H x)ᵀ (H d) = xᵀ d`` because ``H Hᵀ = I``; what changes is the shape of the values that
    get quantised: outliers are spread over ``size`` tokens.

    Args:
      size: tokens per rotation, a power of two.
      signs: ``size`` values of ±1, fixed for the whole run; the default serves ``size=16``, None
        is all +1.

    Raises:
      ValueError: if ``size`` is not a power of two or ``signs`` does not fit it.

    Example:
      >>> RHT(16).size
      16

    References:
      arXiv:2509.25149, section 4.2 and appendix C.
    """

    size: int = 16
    signs: tuple[int, ...] | None = TE_SIGNS

    def __post_init__(self):
        hadamard_matrix(self.size, self.signs)  # raises ValueError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Number formats of the six operand uses of a linear layer, and how gradients are formed.

    Gradients are straight-through: the derivative of the rounding is taken as one, everywhere.

    Args:
      name: how the recipe is called in logs.
      fwd_x, fwd_w: operands of the forward product ``x w``.
      bwd_d, bwd_w: operands of the input-gradient product ``d wᵀ``.
      upd_d, upd_x: operands of the weight-gradient product ``xᵀ d``.
      wgrad_transform: rotation of the two update operands before they are quantised, or None.
      residuals: what the backward products are made from. ``"master"``: the unquantised ``x`` and
        ``w``. ``"quantized"``: the values that the forward product really used.
      execution: ``"emulate"``: operands are rounded and the product runs in the dtype of ``x``.
        ``"native"``: the product gets real 8-bit operands and the scales are applied to its result
        (formats with one scale along the contraction axis only).
      keep_last: fraction of the last blocks of a model that ``apply_recipe`` leaves alone.

    Raises:
      ValueError: if an option is unknown.
      NotImplementedError: if the formats cannot be executed natively.

    Example:
      >>> recipe = RECIPES["fp4_all_the_way"]
      >>> recipe.stochastic_points
      ('bwd_d', 'upd_d', 'upd_x')
      >>> RECIPES["bf16"].is_identity
      True

    References:
      arXiv:2505.19115, section 3; arXiv:2509.25149.
    """

    name: str
    fwd_x: OperandQuant = OperandQuant()
    fwd_w: OperandQuant = OperandQuant()
    bwd_d: OperandQuant = OperandQuant()
    bwd_w: OperandQuant = OperandQuant()
    upd_d: OperandQuant = OperandQuant()
    upd_x: OperandQuant = OperandQuant()
    wgrad_transform: RHT | None = None
    residuals: Literal["master", "quantized"] = "master"
    execution: Literal["emulate", "native"] = "emulate"
    keep_last: float = 0.0

    def __post_init__(self):
        for point in POINTS:
            if not isinstance(getattr(self, point), OperandQuant):
                raise ValueError(f"{point} must be an OperandQuant, got {getattr(self, point)!r}")
        _one_of("residuals", self.residuals, ("master", "quantized"))
        _one_of("execution", self.execution, ("emulate", "native"))
        if not 0.0 <= self.keep_last < 1.0:
            raise ValueError(f"keep_last must lie in [0, 1), got {self.keep_last}")
        if self.execution == "native":
            self._check_native()

    def _check_native(self):
        if self.residuals != "master":
            raise ValueError("execution 'native' needs residuals='master'")
        for point in POINTS:
            quant = getattr(self, point)
            eight_bit = quant.format in ("fp8_e4m3", "fp8_e5m2")
            one_scale = quant.granularity == "tensor" or (
                quant.granularity == "contraction" and quant.tile in ("default", None)
            )
            if not (eight_bit and one_scale):
                raise NotImplementedError(
                    f"execution 'native' needs fp8_e4m3 or fp8_e5m2 with one scale along the "
                    f"contraction axis at every point; {point} is {quant}. Use 'emulate'."
                )

    @property
    def is_identity(self) -> bool:
        """True if no operand is changed, so that the plain product is used."""
        return all(getattr(self, point).format is None for point in POINTS)

    @property
    def stochastic_points(self) -> tuple[str, ...]:
        """Names of the points that round stochastically and therefore need a key."""
        return tuple(
            point
            for point in POINTS
            if getattr(self, point).format is not None
            and getattr(self, point).rounding == "stochastic"
        )

    def replace_points(self, points: tuple[str, ...] = POINTS, **options) -> "Recipe":
        """Changes options of several points at once, leaving unquantised points alone.

        Args:
          points: names out of ``POINTS``.
          **options: fields of OperandQuant.

        Returns:
          A new Recipe with the same name.

        Raises:
          ValueError: for an unknown point.

        Example:
          >>> all_nearest = RECIPES["fp4_all_the_way"].replace_points(rounding="nearest")
          >>> all_nearest.stochastic_points
          ()
        """
        unknown = [point for point in points if point not in POINTS]
        if unknown:
            raise ValueError(f"points must be out of {POINTS}, got {unknown}")
        changed = {
            point: dataclasses.replace(getattr(self, point), **options)
            for point in points
            if getattr(self, point).format is not None
        }
        return dataclasses.replace(self, **changed)

    def with_sr_overrange(self, factor: float = 17 / 16) -> "Recipe":
        """Sets the over-range factor of every stochastically rounded point.

        Args:
          factor: in [1, 2]; 17/16 makes stochastic rounding under E4M3 scales unbiased.

        Returns:
          A new Recipe.

        Example:
          >>> RECIPES["fp4_all_the_way"].with_sr_overrange().upd_x.overrange
          1.0625
        """
        return self.replace_points(self.stochastic_points, overrange=factor)


def resolve_recipe(recipe: "str | Recipe | None") -> Recipe:
    """Looks a recipe up by name; a Recipe passes through and None means ``"bf16"``.

    Args:
      recipe: key of ``RECIPES``, a Recipe, or None.

    Returns:
      The Recipe.

    Raises:
      ValueError: for an unknown name, listing the known ones.

    Example:
      >>> resolve_recipe("mxfp8").fwd_x.format
      'mxfp8'
    """
    if recipe is None:
        return RECIPES["bf16"]
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {sorted(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]


def kept_blocks(num_blocks: int, keep_last: float) -> int:
    """Number of last blocks that stay in high precision: ``⌈keep_last · num_blocks⌉``.

    Args:
      num_blocks: blocks of the model.
      keep_last: fraction in [0, 1).

    Returns:
      A count of blocks.

    Example:
      >>> kept_blocks(20, .15), kept_blocks(3, .15), kept_blocks(8, 0.)
      (3, 1, 0)
    """
    return math.ceil(round(num_blocks * keep_last, 9))


def _everywhere(name: str, quant: OperandQuant, **options) -> Recipe:
    return Recipe(name, **dict.fromkeys(POINTS, quant), **options)


def _build_recipes() -> dict[str, Recipe]:
    nearest = OperandQuant("nvfp4")
    stochastic = OperandQuant("nvfp4", "stochastic")
    split = {"bwd_d": stochastic, "upd_d": stochastic, "upd_x": stochastic}
    weight = OperandQuant("nvfp4", granularity="square", tile=16)

    fp8 = OperandQuant("fp8_e4m3", granularity="tensor")
    fp8_gradient = OperandQuant("fp8_e5m2", granularity="tensor")
    fp8_row = OperandQuant("fp8_e4m3", tile=128)
    fp8_weight = OperandQuant("fp8_e4m3", granularity="square", tile=128)

    # OCP's floor rule lets the largest element saturate; that biases stochastic rounding, so the
    # stochastic points take the rule that never saturates.
    mx = OperandQuant("mxfp4", scale_rule="floor")
    mx_stochastic = OperandQuant("mxfp4", "stochastic", scale_rule="ceil")
    mx_split = {"bwd_d": mx_stochastic, "upd_d": mx_stochastic, "upd_x": mx_stochastic}

    recipes = [
        Recipe("bf16"),
        dataclasses.replace(
            _everywhere("fp8_current", fp8), bwd_d=fp8_gradient, upd_d=fp8_gradient
        ),
        dataclasses.replace(_everywhere("fp8_block", fp8_row), fwd_w=fp8_weight, bwd_w=fp8_weight),
        _everywhere("mxfp8", OperandQuant("mxfp8", scale_rule="ceil")),
        dataclasses.replace(_everywhere("mxfp4", mx), **mx_split),
        dataclasses.replace(_everywhere("fp4_all_the_way", nearest), **split),
        _everywhere("fp4_rtn", nearest),
        _everywhere("fp4_sr", stochastic),
        Recipe(
            "nvidia_nvfp4",
            fwd_x=nearest,
            fwd_w=weight,
            bwd_d=stochastic,
            bwd_w=weight,
            upd_d=stochastic,
            upd_x=nearest,
            wgrad_transform=RHT(16),
            keep_last=0.15,
        ),
    ]
    return {recipe.name: recipe for recipe in recipes}


RECIPES: dict[str, Recipe] = _build_recipes()

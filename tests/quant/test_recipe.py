"""Recipes as data: what the named ones say, and which combinations are refused."""

import dataclasses

import pytest

from jaxeff.quant import POINTS, RECIPES, RHT, OperandQuant, Recipe, resolve_recipe


def test_named_recipes():
    names = (
        "bf16 fp8_current fp8_delayed fp8_rowwise fp8_block mxfp8 mxfp4 fp4_all_the_way fp4_rtn "
        "fp4_sr nvidia_nvfp4 quartet quartet2 tetrajet2"
    )
    assert set(names.split()) <= set(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert hash(recipe) == hash(dataclasses.replace(recipe))
        assert resolve_recipe(name) is recipe


def test_split_rounding_is_the_papers_table():
    recipe = RECIPES["fp4_all_the_way"]
    rounding = {point: getattr(recipe, point).rounding for point in POINTS}
    assert rounding == {
        "fwd_x": "nearest",
        "fwd_w": "nearest",
        "bwd_d": "stochastic",
        "bwd_w": "nearest",
        "upd_d": "stochastic",
        "upd_x": "stochastic",
    }
    assert {getattr(recipe, point).format for point in POINTS} == {"nvfp4"}
    assert {getattr(recipe, point).overrange for point in POINTS} == {1.0}


def test_nvidia_recipe():
    recipe = RECIPES["nvidia_nvfp4"]
    assert recipe.stochastic_points == ("bwd_d", "upd_d")
    assert recipe.fwd_w == recipe.bwd_w, "forward and backward must see the same weight"
    assert (recipe.fwd_w.granularity, recipe.fwd_w.tile) == ("square", 16)
    assert recipe.wgrad_transform == RHT(16) and recipe.keep_last == 0.15


def test_changing_points():
    recipe = RECIPES["fp4_all_the_way"].with_sr_overrange()
    changed = {point for point in POINTS if getattr(recipe, point).overrange == 17 / 16}
    assert changed == set(recipe.stochastic_points)
    with pytest.raises(ValueError, match="points must be out of"):
        recipe.replace_points(("fwd_y",), rounding="nearest")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OperandQuant("fp3"), "unknown format 'fp3'"),
        (lambda: OperandQuant("nvfp4", "down"), "rounding must be one of"),
        (lambda: OperandQuant("nvfp4", granularity="row"), "granularity must be one of"),
        (lambda: OperandQuant("nvfp4", tile=0), "tile must be 'default', None or a positive int"),
        (lambda: OperandQuant("nvfp4", tile=True), "tile must be 'default', None or a positive"),
        (lambda: OperandQuant("nvfp4", overrange=0.5), r"overrange must lie in \[1, 2\], got 0.5"),
        (lambda: OperandQuant("mxfp4", scale_rule="up"), "scale_rule must be one of"),
        (lambda: OperandQuant("fp8_e4m3", granularity="square"), "needs a tile size"),
        (lambda: OperandQuant("nvfp4", granularity="square", tile=None), "needs a tile size"),
        (lambda: RHT(12), "size must be a power of two, got 12"),
        (lambda: RHT(32), "signs must have length 32"),
        (lambda: Recipe("x", fwd_x="nvfp4"), "fwd_x must be an OperandQuant, got 'nvfp4'"),
        (lambda: Recipe("x", residuals="none"), "residuals must be one of"),
        (lambda: Recipe("x", keep_last=1.0), r"keep_last must lie in \[0, 1\), got 1.0"),
        (lambda: resolve_recipe("fp5"), "recipe must be one of .*'fp4_all_the_way'.* got 'fp5'"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["mxfp8", "fp4_rtn"])
def test_native_refused(name):
    message = "one scale along the contraction axis at every point; fwd_x is .* Use 'emulate'"
    with pytest.raises(NotImplementedError, match=message):
        dataclasses.replace(RECIPES[name], execution="native")
    with pytest.raises(ValueError, match="execution 'native' needs residuals='master'"):
        dataclasses.replace(RECIPES["fp8_current"], execution="native", residuals="quantized")

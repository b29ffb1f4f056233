"""The training loop: it learns, resumes exactly, compiles once, and runs sharded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxeff import train
from jaxeff.data import batches
from jaxeff.quant import RECIPES, QAFPhase, apply_recipe

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)


class TinyModel(nnx.Module):
    """Embedding, two residual layers, output head: a bigram model with room to spare."""

    def __init__(self, seed=0, width=32, param_dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.embed = nnx.Embed(128, width, **options)
        self.layers = nnx.List([nnx.Linear(width, width, **options) for _ in range(2)])
        self.lm_head = nnx.Linear(width, 128, **options)

    def __call__(self, tokens, attention_fn=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + nnx.gelu(layer(x))
        return self.lm_head(x if attention_fn is None else attention_fn(x))


def _model(recipe, **options):
    model = TinyModel(**options)
    apply_recipe(model, recipe)
    return model


def _fit(model, steps=12, **options):
    config = options.pop("config", train.TrainConfig(steps=steps, learning_rate=1e-2, log_every=5))
    return train.fit(model, batches(TEXT, 8, 16, seed=1), config, progress=False, **options)


@pytest.mark.parametrize("recipe", ["bf16", "fp4_all_the_way"])
def test_loss_falls(recipe):
    model = _model(recipe)
    before = train.evaluate(model, [batches(TEXT, 8, 16, seed=9)[0]])
    result = _fit(model, steps=60)
    assert result.losses.shape == result.grad_norms.shape == (60,)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert train.evaluate(model, [batches(TEXT, 8, 16, seed=9)[0]]) < 0.5 * before
    assert result.tokens_per_second > 0 and result.seconds > 0 and result.start_step == 0


def test_resume_is_exact(tmp_path):
    """Interrupted at step 8 of 12, with another model object, seeds included."""
    whole, first, second = (_model("fp4_all_the_way") for _ in range(3))
    config = train.TrainConfig(steps=12, learning_rate=1e-2, checkpoint_every=4, log_every=3)
    expected = _fit(whole, config=config)

    class Interrupted(Exception):
        pass

    class Stream(type(batches(TEXT, 8, 16))):
        def __iter__(self):
            for index in range(8):
                yield self[index]
            raise Interrupted

    options = {"config": config, "progress": False, "checkpoint_dir": tmp_path / "c"}
    with pytest.raises(Interrupted):
        train.fit(first, Stream(TEXT, 8, 16, seed=1), log_path=tmp_path / "log", **options)
    rest = train.fit(
        second,
        iter(batches(TEXT, 8, 16, seed=1)),  # a plain iterator is read up to the step
        resume=True,
        log_path=tmp_path / "log",
        **options,
    )
    assert rest.start_step == 8
    np.testing.assert_array_equal(rest.losses, expected.losses[8:])
    params = [nnx.state(model, nnx.Param) for model in (whole, second)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 11
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_00000008", "step_00000012"]
    # Nothing is left to do: the finished model is loaded.
    third = _model("fp4_all_the_way")
    assert train.fit(third, batches(TEXT, 8, 16), resume=True, **options).losses.size == 0
    np.testing.assert_array_equal(third.embed.embedding[...], whole.embed.embedding[...])


def test_resume_into_another_model_names_the_leaf(tmp_path):
    config = train.TrainConfig(steps=1, learning_rate=1e-2)
    _fit(_model("bf16"), config=config, checkpoint_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit: .*'embed'.*float32 \[128, 32\] .*\[128, 16\]"
    ):
        _fit(_model("bf16", width=16), config=config, checkpoint_dir=tmp_path, resume=True)


def test_step_compiles_once():
    model = _model("fp4_all_the_way")
    optimizer = train.TrainConfig(steps=5, learning_rate=1e-2).optimizer()
    graph, state = train.init_state(model, optimizer)
    step = jax.jit(lambda state, tokens: train.train_step(graph, optimizer, state, tokens))
    for tokens, _ in zip(batches(TEXT, 4, 8), range(3), strict=False):
        state, _ = step(state, jnp.asarray(tokens))
    assert step._cache_size() == 1 and int(state.step) == 3


def test_log_and_callback(tmp_path):
    seen = []
    result = _fit(
        _model("bf16"), log_path=tmp_path / "a" / "log.jsonl", on_step=lambda *a: seen.append(a)
    )
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 9, 11]
    assert lines[-1]["loss"] == pytest.approx(float(result.losses[-1]))
    assert lines[-1]["bits_per_byte"] == pytest.approx(lines[-1]["loss"] / np.log(2))
    assert lines[-1]["learning_rate"] > 0 and lines[-1]["grad_norm"] > 0
    assert [step for step, _ in seen] == list(range(12))


def test_progress_bar_shows_numbers():
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    config = train.TrainConfig(steps=4, learning_rate=1e-2, log_every=1)
    train.fit(_model("bf16"), batches(TEXT, 8, 16), config, console=console, description="tiny")
    text = console.file.getvalue()
    assert "tiny" in text and "bits/byte" in text and "tokens/s" in text and "4/4" in text


@pytest.mark.multidevice
@pytest.mark.parametrize("recipe", ["bf16", "fp4_all_the_way"])
def test_sharded_step_equals_single_device(recipe):
    """Eight devices, batch split over them, random bits included."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    single, sharded = _model(recipe), _model(recipe)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    expected, got = _fit(single, steps=3), _fit(sharded, steps=3, sharding=sharding)
    # Sums over the batch run in another order; a flipped rounding shows as a jump, not as 1e-5.
    np.testing.assert_allclose(got.losses, expected.losses, rtol=2e-4)
    np.testing.assert_allclose(got.losses[0], expected.losses[0], rtol=1e-6)
    np.testing.assert_allclose(got.grad_norms[0], expected.grad_norms[0], rtol=1e-4)


def test_stochastic_rounding_keeps_bfloat16_parameters():
    model = _model("bf16", param_dtype=jnp.bfloat16)
    config = train.TrainConfig(steps=40, learning_rate=1e-2, stochastic_rounding=True)
    result = _fit(model, config=config)
    assert model.embed.embedding[...].dtype == jnp.bfloat16
    assert result.losses[-1] < 0.7 * result.losses[0]


def test_evaluate():
    model = _model("bf16")
    stream = batches(TEXT, 4, 8)
    each = [train.evaluate(model, [stream[index]]) for index in range(2)]
    assert train.evaluate(model, [stream[0], stream[1]]) == pytest.approx(np.mean(each), rel=1e-6)
    silent = train.evaluate(model, [stream[0]], attention_fn=jnp.zeros_like)
    assert silent == pytest.approx(np.log(128), rel=1e-2)
    with pytest.raises(ValueError, match="batches is empty"):
        train.evaluate(model, [])


def test_bad_input():
    model = _model("bf16")
    config = train.TrainConfig(steps=3, learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"batches ended after 1; config\.steps=3"):
        train.fit(model, [batches(TEXT, 4, 8)[0]], config, progress=False)
    with pytest.raises(
        ValueError, match=r"integers \[B, T \+ 1\] with T ≥ 1, got float32 \[2, 3\]"
    ):
        train.fit(model, [np.zeros((2, 3), np.float32)], config, progress=False)
    with pytest.raises(ValueError, match="resume=True needs checkpoint_dir"):
        train.fit(model, [], config, resume=True)
    for options, message in [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"peak must be positive, got 0\.0"),
        ({"warmup_steps": 9}, r"warmup_steps must lie in \[0, steps=3\), got 9"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None"),
        ({"final_fraction": 2.0}, r"final_fraction must lie in \[0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            train.TrainConfig(**({"steps": 3, "learning_rate": 1e-2} | options))


def test_divergence_is_reported():
    model = _model("bf16")
    model.lm_head.bias[...] = jnp.full(128, jnp.nan)
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        _fit(model)


def test_second_phase_and_8_bit_moments():
    """Both options of the configuration reach the step: it learns, and the phase has switched."""
    model = _model(RECIPES["fp4_all_the_way"].with_qaf("backward"))
    config = train.TrainConfig(
        steps=12,
        learning_rate=1e-2,
        warmup_steps=0,
        final_fraction=1.0,
        optimizer_state="dynamic8",
        qaf_start=6,
    )
    losses = _fit(model, config=config).losses
    assert losses[-1] < losses[0]
    assert all(map(bool, jax.tree.leaves(nnx.state(model, QAFPhase))))
    state = jax.eval_shape(config.optimizer().init, nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.size >= 4096} == {
        jnp.dtype("uint8")
    }
    rate = config.schedule()
    np.testing.assert_allclose([rate(5), rate(6), rate(8)], [1e-2, 1e-2 / 3, 1e-2], rtol=1e-6)
    with pytest.raises(ValueError, match=r"qaf_start must lie in \[0, 12\), got 12"):
        train.TrainConfig(steps=12, learning_rate=1e-2, qaf_start=12)


class StackedModel(nnx.Module):
    """Two layers made by vmap and run by scan."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        make = nnx.vmap(lambda rngs: nnx.Linear(32, 32, rngs=rngs), in_axes=0, out_axes=0)
        self.embed = nnx.Embed(128, 32, rngs=rngs)
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, tokens):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = scan(lambda layer, x: x + nnx.gelu(layer(x)))(self.layers, self.embed(tokens))
        return self.embed.attend(x)


@pytest.mark.parametrize("recipe", ["fp4_all_the_way", "fp8_delayed"])
def test_a_scan_over_layers_trains(recipe):
    model = StackedModel()
    apply_recipe(model, recipe)
    result = _fit(model, steps=4)
    assert result.losses[-1] < result.losses[0]
    if recipe == "fp8_delayed":
        seen = np.asarray(model.layers.dot_general.history[...])
        assert (seen[:, :, :4] > 0).all() and (seen[:, :, 4:] == 0).all()

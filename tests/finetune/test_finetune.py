"""Methods in a model: what is trained, what is stored, and what comes out."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxeff.data import batches
from jaxeff.finetune import (
    FALQON,
    FP8LoRA,
    LoRA,
    QLoRA,
    adapt,
    adapted_layers,
    finetune_config,
    fit,
    init_state,
    merge,
    train_step,
)
from jaxeff.finetune.layers import Frozen, LoRALinear, MeldedWeight, frozen_dot
from jaxeff.models import Decoder, ModelConfig
from jaxeff.optim.falqon import write_rows
from jaxeff.train import next_token_loss
from pallas_kernels import quantize
from pallas_kernels.formats import quantize_nf4

CONFIG = ModelConfig.qwen2(vocab_size=64, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 13)), jnp.int32)
TEXT = np.tile(np.random.default_rng(1).integers(0, 64, 29), 40).astype(np.uint8)
ONE = r"layers\.0\.mlp\.up_proj"


def decoder(seed=0):
    attention = jax.nn.dot_product_attention
    return Decoder(CONFIG, rngs=nnx.Rngs(seed), attention_fn=attention)


class Small(nnx.Module):
    """Two linear layers over a one-hot code: the cheapest thing with ``model(tokens)``."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.up = nnx.Linear(32, 48, rngs=rngs)
        self.down = nnx.Linear(48, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.down(jax.nn.relu(self.up(self.embed(tokens))))


BOTH = "up|down"
forward = nnx.jit(lambda model, tokens: model(tokens))


def adapted(method, seed=0, rules=BOTH):
    model = Small(seed)
    adapt(model, [(rules, method)], seed=seed)
    return model


# --- what a method does to a model ---


@pytest.mark.parametrize("method", [LoRA(4), QLoRA(4), FP8LoRA(4), FALQON.code(4)])
def test_only_adapters_are_trainable_and_the_start_is_the_base(method):
    model = adapted(method)
    trainable = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in trainable) == (
        0 if isinstance(method, FALQON) else 4 * (32 + 48 + 48 + 64)
    )
    base, start = forward(Small(), TOKENS), forward(model, TOKENS)
    error = float(jnp.linalg.norm(start - base) / jnp.linalg.norm(base))
    # Measured: bfloat16 .002, NF4 .1, FP8 .04.
    assert error < {LoRA: 0.005, QLoRA: 0.15, FP8LoRA: 0.06, FALQON: 0.06}[type(method)]


def test_a_decoder_by_its_default_rule_and_mixed_rules():
    model = decoder()
    plan = adapt(model, LoRA(2))
    assert plan.pop("lm_head") == "frozen" and set(plan.values()) == {"LoRA"}
    assert isinstance(model.embed.embedding, Frozen) and isinstance(
        model.layers[0].mlp_norm.scale, Frozen
    )
    assert model.layers[0].attention.q_proj.bias is not None
    model = decoder()
    plan = adapt(model, [(r"attention\.[qkv]_proj", QLoRA(2)), ("mlp.up", FALQON(4))])
    assert plan["layers.0.attention.q_proj"] == "QLoRA" and plan["layers.0.mlp.up_proj"] == "FALQON"
    assert plan["layers.0.attention.out_proj"] == "frozen"


def test_falqon_leaves_sides_that_do_not_divide():
    plan = adapt(Small(), [("up", LoRA(4)), ("down", FALQON(4, multiple_of=32))])
    assert plan == {"down": "frozen", "up": "LoRA"}
    with pytest.raises(
        ValueError, match="of 2 that match, none has sides that are multiples of 32"
    ):
        adapt(Small(), [("up|down", FALQON(4, multiple_of=32))])
    plan = adapt(Small(), [("up|down", FALQON.code(4))])
    assert set(plan.values()) == {"FALQON"}


@pytest.mark.parametrize(
    ("message", "rules"),
    [
        (r"rank is 33; layer 'up' with weight \(32, 48\) allows at most 32", [(BOTH, LoRA(33))]),
        ("rule 'middle' matches no linear layer; the paths are", [("middle", LoRA(2))]),
        (r"layer 'up' is matched by 2 rules: \['up', 'u'\]", [("up", LoRA(2)), ("u", QLoRA(2))]),
        ("rules is empty", []),
        ("k is 64; layer 'up' has only 48 outputs", [("up", FALQON(2, k=64))]),
    ],
)
def test_bad_rules_leave_the_model_whole(message, rules):
    model = Small()
    with pytest.raises(ValueError, match=message):
        adapt(model, rules)
    assert isinstance(model.up, nnx.Linear) and isinstance(model.up.kernel, nnx.Param)


def test_other_messages():
    with pytest.raises(ValueError, match="model is adapted already, at"):
        adapt(adapted(LoRA(2)), LoRA(2))
    with pytest.raises(ValueError, match="has no adapted layer"):
        merge(Small())
    with pytest.raises(ValueError, match="has no adapted layer: call adapt first"):
        fit(Small(), [], finetune_config(1, 1e-3))
    with pytest.raises(ValueError, match="rank must be an int, at least 1, got 0"):
        LoRA(0)
    with pytest.raises(ValueError, match="backbone must be None or one of"):
        LoRA(2, backbone="int3")
    with pytest.raises(ValueError, match="requant must be one of"):
        FALQON(2, requant="floor")
    with pytest.raises(NotImplementedError, match="out_sharding is not served"):
        adapted(LoRA(2)).up(jnp.ones((1, 32)), out_sharding=jax.P())
    model = Small()
    adapt(model, [("up", FALQON.code(4)), ("down", FALQON.anchored(4))])
    with pytest.raises(ValueError, match="FALQON layers must agree in requant"):
        init_state(model, optax.sgd(1.0))


# --- memory ---


def weight_like_bytes(shapes):
    """Bytes of all live arrays of 2 or more bytes an element with one of these shapes."""
    gc.collect()
    shapes = {tuple(s) for s in shapes} | {tuple(s[::-1]) for s in shapes}
    return sum(a.nbytes for a in jax.live_arrays() if a.shape in shapes and a.dtype.itemsize > 1)


@pytest.mark.parametrize("method", [QLoRA(2), FP8LoRA(2), FALQON(2)])
def test_no_wide_copy_of_the_backbone_survives(method):
    """Neither after adapting nor after a compiled step; sizes that nothing else here has."""
    shapes = [(37, 53), (53, 37), (39, 53), (55, 37)]
    before = weight_like_bytes(shapes)
    model = nnx.Sequential(
        nnx.Linear(37, 53, rngs=nnx.Rngs(0)), nnx.Linear(53, 37, rngs=nnx.Rngs(1))
    )
    assert weight_like_bytes(shapes) > before
    adapt(model, [("layers", method)])
    assert weight_like_bytes(shapes) == before
    static, state, frozen = init_state(model, optax.adam(1e-3))

    def loss(params, weights):
        from jaxeff.finetune.training import _merge

        return _merge(static.graph, params, weights, frozen)(jnp.ones((4, 37))).sum()

    step = jax.jit(jax.grad(loss))
    jax.block_until_ready(step(state.params, state.melded))
    assert weight_like_bytes(shapes) == before
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, Frozen, MeldedWeight)))
    # Bytes a weight: NF4 padded to blocks of 64 here; FP8 one; anchored two, and A; biases.
    assert stored < {QLoRA: 1.0, FP8LoRA: 1.2, FALQON: 2.3}[type(method)] * 2 * 37 * 53 + 500


def test_nf4_product_keeps_no_dequantised_weights_between_the_passes():
    """The gradient of a chain of products needs one dequantised weight at a time, not all."""
    weights = [quantize_nf4(jnp.ones((128, 128)), double=False) for _ in range(8)]

    def chain(x):
        for weight in weights:
            x = jnp.tanh(frozen_dot(x, weight))
        return x.sum()

    compiled = jax.jit(jax.grad(chain)).lower(jnp.ones((1, 128))).compile()
    dense = 128 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * dense  # eight would be kept


# --- gradients and steps ---


def test_frozen_product_gradient():
    x, weight = jnp.ones((3, 16)), 0.1 * jax.random.normal(jax.random.key(0), (16, 8))
    for stored, atol in (
        (weight, 1e-6),
        (quantize_nf4(weight.T), 1e-6),
        (quantize(weight.T, "fp8_e4m3", axis=None), 1e-2),
    ):
        full = stored if isinstance(stored, jax.Array) else stored.dequantize().T
        y, pull = jax.vjp(lambda x, w=stored: frozen_dot(x, w), x)
        np.testing.assert_allclose(y, x @ full, rtol=1e-3, atol=1e-4)
        d = jnp.linspace(0.5, 1.0, 8) * jnp.ones((3, 8))
        # E5M2 keeps two bits of the gradient: relative error up to 1/8 of a term.
        np.testing.assert_allclose(pull(d)[0], d @ full.T, atol=atol * 10)


def test_lora_gradient_equals_that_of_the_dense_weight():
    """dL/dB = (x A)^T d and dL/dA = x^T (d B^T), from the dense layer's dL/dW."""
    model = adapted(LoRA(2, alpha=6, backbone="float32"))
    model.up.lora_b.set_value(jnp.ones((2, 48)))

    def loss(model):
        return jnp.sum(model(TOKENS) ** 2)

    grads = nnx.jit(nnx.grad(loss))(model)
    dense = nnx.jit(nnx.grad(loss))(merge(model))["up"]["kernel"][...]
    a, b = model.up.lora_a[...], model.up.lora_b[...]
    np.testing.assert_allclose(grads["up"]["lora_b"][...], 3 * a.T @ dense, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads["up"]["lora_a"][...], 3 * dense @ b.T, rtol=1e-3, atol=1e-3)
    frozen = adapted(LoRA(2, train_a=False))
    assert not isinstance(frozen.up.lora_a, nnx.Param)


def test_falqon_step_is_the_gradient_of_the_merged_weight_written_into_rows():
    """One step of SGD against the same thing done by hand with a dense model."""
    model = adapted(FALQON(4, k=3, requant="anchored"))
    dense = merge(model)
    # lr so large that a row moves by several codes; SGD, so that the step is the gradient.
    static, state, frozen = init_state(model, optax.sgd(500.0))
    new, metrics = jax.jit(functools.partial(train_step, static))(state, frozen, TOKENS)

    def loss(model):
        return next_token_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:])

    dense_loss, grads = nnx.jit(nnx.value_and_grad(loss))(dense)
    assert float(metrics["loss"]) == pytest.approx(float(dense_loss), abs=0.02)
    melded = state.melded["up"]
    db = grads["up"]["kernel"][...].T @ melded.adapter_a().T  # [n, r]
    group = "x".join(map(str, (*melded.shape, 4)))  # weights of one shape are stepped together
    step = np.asarray(new.falqon_state.buffer[group][0])
    cosine = np.sum(step * -db) / np.linalg.norm(step) / np.linalg.norm(db)
    assert cosine > 0.99 and np.linalg.norm(step) == pytest.approx(
        500 * np.linalg.norm(db), rel=0.1
    )
    changed = np.flatnonzero(np.any(np.asarray(new.melded["up"].codes != melded.codes), 1))
    assert 0 < len(changed) <= 3 and set(changed) <= set(new.falqon_state.rows[group][0].tolist())
    rows, delta = new.falqon_state.rows[group][0], new.falqon_state.delta[group][0]
    expected = write_rows(melded, rows, delta, requant="anchored")
    np.testing.assert_array_equal(new.melded["up"].codes, expected.codes)


def test_fit_learns_resumes_exactly_and_merges(tmp_path):
    method = FALQON.anchored(8)
    stream = batches(TEXT, 4, 16)
    config = finetune_config(30, 0.02, log_every=10, checkpoint_every=20)
    model = adapted(method)
    before = forward(model, TOKENS)
    whole = fit(model, stream, config, log_path=tmp_path / "log.jsonl", checkpoint_dir=tmp_path)
    assert whole.losses[-1] < whole.losses[0] - 0.2
    after = forward(model, TOKENS)
    assert not np.array_equal(before, after)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    np.testing.assert_allclose(forward(merge(model), TOKENS), after, atol=0.5, rtol=0.1)
    # Cut off after 20 steps: the rest is the same, bit for bit.
    import shutil

    shutil.rmtree(tmp_path / "step_00000030")
    again = adapted(method)
    rest = fit(again, stream, config, checkpoint_dir=tmp_path, resume=True)
    assert rest.start_step == 20
    np.testing.assert_array_equal(rest.losses, whole.losses[20:])
    for a, b in zip(
        jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_delayed_scaling_learns_alike_and_layers_with_one_input_share_its_codes():
    """A decoder: the gated MLP in one piece; q, k and v, and gate and up, have one x each."""
    config = ModelConfig.llama(vocab_size=256, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64)
    losses, states = {}, {}
    for scaling in ("current", "delayed"):
        model = Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)
        adapt(model, dataclasses.replace(FALQON.anchored(8), scaling=scaling))
        static, state, frozen = init_state(model, optax.adam(0.02))
        step = jax.jit(functools.partial(train_step, static))
        for _, tokens in zip(range(20), batches(TEXT, 4, 16), strict=False):
            state, metrics = step(state, frozen, jnp.asarray(tokens))
            losses.setdefault(scaling, []).append(float(metrics["loss"]))
        states[scaling] = state
    assert losses["delayed"][-1] < losses["delayed"][0] - 0.1
    assert losses["delayed"][-1] == pytest.approx(losses["current"][-1], abs=0.05)
    assert states["current"].history is None
    seen = dict(zip(states["delayed"].melded, states["delayed"].history[..., 0], strict=True))
    shares = [name for name, (x, d) in seen.items() if float(x) == 0 and float(d) > 0]
    assert len(seen) == 7 and len(shares) == 3  # two of q, k, v; and up
    with pytest.raises(ValueError, match="scaling must be one of"):
        FALQON(4, scaling="none")


def test_fit_messages():
    with pytest.raises(ValueError, match="resume=True needs checkpoint_dir"):
        fit(adapted(LoRA(2)), [], finetune_config(1, 1e-3), resume=True)
    with pytest.raises(ValueError, match="batches ended after 0; config.steps=2"):
        fit(adapted(LoRA(2)), [], finetune_config(2, 1e-3))


def test_merge_keeps_the_model_and_bias():
    model = adapted(LoRA(2, backbone="float32"))
    model.up.lora_b.set_value(jnp.ones((2, 48)))
    plain = merge(model)
    assert isinstance(model.up, LoRALinear) and isinstance(plain.up, nnx.Linear)
    assert isinstance(plain.embed.embedding, nnx.Param) and plain.up.bias is not None
    np.testing.assert_allclose(forward(plain, TOKENS), forward(model, TOKENS), atol=1e-4)
    assert list(adapted_layers(model)) and not adapted_layers(plain)


class Shared(nnx.Module):
    """One layer at two places, and one weight in two layers."""

    def __init__(self):
        self.first = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.second = self.first
        self.third, self.fourth = (nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in (1, 2))
        self.fourth.kernel = self.third.kernel

    def __call__(self, x):
        return self.fourth(self.third(self.second(self.first(x))))


def test_shared_layers_and_weights_stay_shared():
    model, x = Shared(), jnp.ones((2, 16))
    expected = model(x)
    adapt(model, [("first", LoRA(2, backbone=None))])
    assert model.first is model.second and isinstance(model.first, LoRALinear)
    names = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert names == [("first", "lora_a"), ("first", "lora_b")]
    assert model.third.kernel is model.fourth.kernel and isinstance(model.third.kernel, Frozen)
    np.testing.assert_allclose(model(x), expected, rtol=1e-6, atol=1e-6)
    plain = merge(model)
    assert plain.first is plain.second and plain.third.kernel is plain.fourth.kernel
    assert isinstance(plain.third.kernel, nnx.Param)
    np.testing.assert_allclose(plain(x), expected, rtol=1e-6, atol=1e-6)


def test_merging_gives_back_precision_and_names_of_axes():
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), my_axes=("in", "out"))
    model = nnx.Sequential(
        nnx.Linear(16, 16, precision="highest", rngs=nnx.Rngs(0)),
        nnx.Linear(16, 16, kernel_init=init, rngs=nnx.Rngs(0)),
    )
    adapt(model, [(r"layers\.0", LoRA(2))])
    assert model.layers[1].kernel.my_axes == ("in", "out")
    plain = merge(model)
    assert plain.layers[0].precision == "highest"
    assert plain.layers[1].kernel.my_axes == ("in", "out")


def test_methods_check_their_settings():
    for options in ({"k": 0}, {"k": "some"}, {"k": True}, {"implementation": "cuda"}):
        with pytest.raises(ValueError, match="k must be a positive int|implementation must be"):
            FALQON(2, **options)
    with pytest.raises(
        ValueError, match="method of layer 'up' must be a LoRA or FALQON, got 'LoRA'"
    ):
        adapt(Small(), [("up", "LoRA")])


@pytest.mark.parametrize("method", [LoRA(2), QLoRA(2), FP8LoRA(2), FALQON(2)])
def test_no_rows(method):
    model = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    adapt(model, [("layers", method)])
    assert model(jnp.zeros((2, 0, 16))).shape == (2, 0, 8)


class Noisy(nnx.Module):
    """A forward pass that changes the model: dropout counts, BatchNorm averages."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(64, 16, rngs=rngs)
        self.layer = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.lm_head = nnx.Linear(16, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.lm_head(self.norm(self.dropout(nnx.gelu(self.layer(self.embed(tokens))))))


def test_dropout_and_batch_norm_go_on_and_resume(tmp_path):
    def run(steps, **options):
        model = Noisy()
        adapt(model, [("layer", LoRA(2))])
        config = finetune_config(steps, 1e-3)
        result = fit(model, batches(TEXT, batch=2, seq_len=8), config, **options)
        return result.losses, int(model.dropout.rngs.count[...]), model.norm.mean[...]

    losses, count, mean = run(4)
    assert count == 4 and (mean != 0).any()
    run(2, checkpoint_dir=tmp_path)
    resumed, count, again = run(4, checkpoint_dir=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed, losses[2:])
    np.testing.assert_array_equal(again, mean)
    assert count == 4

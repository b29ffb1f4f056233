"""The loss of a frozen head by chunks, against the loss of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxeff.finetune import LoRA, adapt
from jaxeff.finetune.head import CHUNK, head_loss, loss_of
from jaxeff.models import Decoder, ModelConfig
from jaxeff.train import next_token_loss

KEYS = jax.random.split(jax.random.key(0), 3)
TOKENS = jax.random.randint(KEYS[2], (2, 9), 0, 32)


def plain(x, kernel, targets):
    logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@pytest.mark.parametrize(("count", "dtype"), [(7, "float32"), (2 * CHUNK + 452, "bfloat16")])
def test_loss_and_gradient_are_those_of_all_logits(count, dtype):
    x = (2 * jax.random.normal(KEYS[0], (count, 16))).astype(dtype)
    kernel = jax.random.normal(KEYS[1], (16, 50)).astype(dtype)
    targets = jax.random.randint(KEYS[2], (count,), 0, 50)
    wide = (x.astype(jnp.float32), kernel.astype(jnp.float32), targets)
    want, slope = jax.value_and_grad(plain)(*wide)
    # Times three: what comes in from above is used.
    loss, got = jax.value_and_grad(lambda x: 3 * head_loss(x, kernel, targets))(x)
    assert float(loss) == pytest.approx(3 * float(want), rel=1e-5)
    assert got.dtype == x.dtype
    error = jnp.linalg.norm(got.astype(jnp.float32) / 3 - slope) / jnp.linalg.norm(slope)
    assert float(error) < (1e-6 if dtype == "float32" else 5e-3)
    assert float(head_loss(x, kernel, targets)) == pytest.approx(float(want), rel=1e-5)


def decoder(**options):
    config = ModelConfig.llama(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, **options)
    return Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)


@pytest.mark.parametrize("tie", [False, True])
def test_a_decoder_with_a_frozen_head_never_has_all_logits(tie):
    model = decoder(tie_embeddings=tie)
    adapt(model, LoRA(2, backbone="float32"))
    want = next_token_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:])
    assert float(loss_of(model, TOKENS)) == pytest.approx(float(want), rel=1e-6)
    graph, state = nnx.split(model)
    text = str(jax.make_jaxpr(lambda state: loss_of(nnx.merge(graph, state), TOKENS))(state))
    assert "f32[16,32]" in text  # one chunk of sixteen tokens


def test_other_heads_are_called_as_they_are():
    whole = decoder()  # nothing is frozen
    model = decoder()
    adapt(model, [("lm_head", LoRA(2, backbone="float32"))])
    for each in (whole, model):
        want = next_token_loss(each(TOKENS[:, :-1]), TOKENS[:, 1:])
        np.testing.assert_array_equal(loss_of(each, TOKENS), want)

"""The snippets of docs/attention.md run, and the adapter for flax's layers."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.nn import flax_attention_fn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attention.md"
SECTIONS = dict(
    re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
)


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_snippets_run_in_order(capsys):
    names = {}
    for section, text in SECTIONS.items():
        for code in snippets(text):
            exec(compile(code, f"{PAGE.name}: {section}", "exec"), names)
            if "out" in names:
                out = names.pop("out")
                assert jnp.isfinite(out).all(), section
    assert "choice (error <= 0.05)" in capsys.readouterr().out
    assert [layer.attention.attention_fn.keywords for layer in names["model"].layers[1:]] == [
        {"quant": "sage2"}
    ]


def test_the_page_has_a_snippet_in_every_section():
    assert len(SECTIONS) == 6 and all(snippets(text) for text in SECTIONS.values())


def layer(**arguments):
    arguments = dict(decode=False, attention_fn=flax_attention_fn()) | arguments
    return nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_full_precision_adapter_equals_flax(lead, masked):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*lead, 12, 32)), jnp.float32)
    mask = None
    if masked:
        mask = jnp.asarray(rng.random((*lead, 1, 12, 12)) < 0.7) | jnp.eye(12, dtype=bool)
        mask = mask.astype(jnp.float32)  # as flax.linen.make_causal_mask gives it
    got = layer()(x, mask=mask, is_causal=True)
    want = layer(attention_fn=nnx.dot_product_attention)(x, mask=mask, is_causal=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_quantised_adapter_differs_but_little_and_decodes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 32)), jnp.float32)
    exact = layer()(x)
    got = layer(attention_fn=flax_attention_fn("sage2"))(x)
    assert 0 < float(jnp.abs(got - exact).max()) < 0.05
    causal = layer()(x, is_causal=True)
    steps = layer(decode=True)
    steps.init_cache(x.shape)
    for t in range(3):
        np.testing.assert_allclose(steps(x[:, t : t + 1])[:, 0], causal[:, t], atol=1e-5)


def test_dtype_is_promoted():
    x = jnp.ones((1, 4, 32))
    assert layer(dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16


def test_linen_passes_its_mask():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 32)), jnp.float32)
    mask = nn.make_causal_mask(jnp.ones((2, 12)))
    ours = nn.MultiHeadDotProductAttention(4, attention_fn=flax_attention_fn())
    theirs = nn.MultiHeadDotProductAttention(4)
    variables = theirs.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        ours.apply(variables, x, mask=mask), theirs.apply(variables, x, mask=mask), atol=1e-5
    )


def test_what_cannot_be_done_is_refused():
    x = jnp.ones((1, 4, 32))
    dropping = layer(dropout_rate=0.1)
    with pytest.raises(NotImplementedError, match=r"dropout_rate is 0\.1: .*deterministic=True"):
        dropping(x, deterministic=False)
    assert dropping(x, deterministic=True).shape == x.shape
    with pytest.raises(NotImplementedError, match="sow_weights=True"):
        layer()(x, sow_weights=True)
    with pytest.raises(NotImplementedError, match="precision is"):
        layer(precision="highest")(x)
    with pytest.raises(TypeError, match="input_positions"):
        layer()(x, input_positions=jnp.arange(4)[None])

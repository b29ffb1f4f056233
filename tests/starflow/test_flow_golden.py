"""Upstream's weights give upstream's numbers (tests/data/golden/*/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.models.starflow import denoise, from_upstream
from jaxeff.models.starflow.upstream import _path

from .flow_cases import channels_last, golden

TAR = ("tarflow", "uncond_c3_p2_w128")
STAR = ("starflow", "rope2d_uncond")


def test_tarflow_forward():
    flow, io, _ = golden(*TAR)
    trace = flow.encode(channels_last(io["x"]))
    np.testing.assert_allclose(trace.inputs[0], io["tokens"], atol=1e-6)
    np.testing.assert_allclose(np.stack(trace.outputs), io["fwd_none_block_outputs"], atol=2e-5)
    np.testing.assert_allclose(trace.logdet, io["fwd_none_logdet"], atol=1e-5)
    per_block = -np.stack(trace.log_sigmas).mean((2, 3))
    np.testing.assert_allclose(per_block, io["fwd_none_block_logdets"], atol=1e-5)
    nll = flow.nll(jnp.asarray(io["tokens"])).mean()
    np.testing.assert_allclose(nll, io["fwd_none_loss"], atol=1e-5)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("g0", {}),
        ("g1.5_annealed_temp1.3", {"guidance": 1.5, "attn_temp": 1.3, "annealed": True}),
        ("g1.5_temp0.7_a", {"guidance": 1.5, "attn_temp": 0.7, "guide_what": "a"}),
    ],
)
def test_tarflow_reverse(run, options):
    flow, io, _ = golden(*TAR)
    tokens, trace = flow.inverse(
        jnp.asarray(io["z_in"]), guidance_kind="linear", return_trace=True, **options
    )
    image = flow.from_tokens(tokens, flow.config.grid)
    np.testing.assert_allclose(image, channels_last(io[f"rev_{run}"]), atol=1e-4, rtol=1e-4)
    if f"rev_{run}_sequence" in io:
        for state, expected in zip(trace.states, io[f"rev_{run}_sequence"], strict=True):
            image = flow.from_tokens(state, flow.config.grid)
            np.testing.assert_allclose(image, channels_last(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", [TAR, STAR])
def test_gradients_and_tweedie(source):
    flow, io, _ = golden(*source)
    x = channels_last(io["x"])
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    def loss(params, x):
        return nnx.merge(graphdef, params, rest).nll(x).mean()

    by_weight, by_x = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    expected = channels_last(io["grad_loss_x"])
    np.testing.assert_allclose(by_x, expected, atol=1e-6, rtol=1e-3)
    ours = {".".join(map(str, p)): leaf for p, leaf in nnx.to_flat_state(by_weight)}
    for name, norm in zip(io["grad_names"], io["grad_norms"], strict=True):
        path, _ = _path(str(name))
        got = float(jnp.linalg.norm(ours[path][...].ravel()))
        np.testing.assert_allclose(got, norm, rtol=1e-3, atol=1e-7, err_msg=name)
    clean = denoise(flow, x, float(io["tweedie_sigma"]))
    np.testing.assert_allclose(clean, channels_last(io["tweedie_x"]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["", "_8x16"])
def test_starflow_forward(suffix):
    flow, io, _ = golden(*STAR)
    trace = flow.encode(channels_last(io[f"x{suffix}"]))
    np.testing.assert_allclose(trace.z, channels_last(io[f"fwd_z{suffix}"]), atol=2e-5, rtol=1e-5)
    outputs = np.stack([trace.inputs[0], *trace.outputs])
    expected = io[f"fwd_block_outputs{suffix}"]
    np.testing.assert_allclose(outputs, expected.reshape(outputs.shape), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(
        -np.stack(trace.log_sigmas), io[f"fwd_logdets{suffix}"], atol=2e-5, rtol=1e-5
    )


def test_starflow_saturated_soft_clip():
    flow, io, settings = golden(*STAR)
    flow = nnx.clone(flow)
    top = flow.blocks[-1].proj_out
    top.kernel[...] = 25 * top.kernel[...]
    top.bias[...] = 25 * top.bias[...]
    trace = flow.encode(channels_last(io["x"]))
    # A float64 forward differs from the recorded float32 one by 1.08 of (2e-5 + 1e-4 abs z), from
    # ours by .25: z is divided by sigma = .031, which magnifies rounding in mu.
    np.testing.assert_allclose(trace.z, channels_last(io["sat25_fwd_z"]), atol=2e-5, rtol=3e-4)
    np.testing.assert_allclose(-trace.log_sigmas[-1], io["sat25_top_logdet"], atol=2e-5, rtol=1e-4)
    sigma = np.exp(trace.log_sigmas[-1])
    limits = settings["measured_error"]["sat25_sigma_range"]
    np.testing.assert_allclose([sigma.min(), sigma.max()], limits, rtol=1e-4)


@pytest.mark.parametrize(
    ("run", "options", "tolerance"),
    [
        ("g0", {}, 1e-4),
        ("jacobi_b16_th0.0_it32", {"chunk": 16, "threshold": 0.0}, 1e-4),
        # Not converged: these two pin the schedule and the stale cache, not the result.
        ("jacobi_b16_th0.001_it32", {"chunk": 16, "threshold": 1e-3}, 1e-3),
        ("jacobi_b8_th0.0_it3", {"chunk": 8, "threshold": 0.0, "max_sweeps": 3}, 1e-3),
    ],
)
def test_starflow_reverse(run, options, tolerance):
    flow, io, _ = golden(*STAR)
    method = "jacobi" if options else "scan"
    x, trace = flow.inverse(channels_last(io["z_in"]), method=method, return_trace=True, **options)
    np.testing.assert_allclose(x, channels_last(io[f"rev_{run}"]), atol=tolerance, rtol=tolerance)
    if run == "g0":
        for i, state in enumerate(trace.states):
            image = flow.from_tokens(state, flow.config.grid)
            np.testing.assert_allclose(
                image, channels_last(io[f"rev_g0_seq{i}"]), atol=1e-4, rtol=1e-4
            )


def test_upstream_errors():
    _, io, settings = golden(*TAR)
    config = settings["model"]
    del io
    with pytest.raises(ValueError, match="lacks the weights"):
        from_upstream({}, config)
    with pytest.raises(ValueError, match=r"unknown name 'blocks\.0\.magic'"):
        from_upstream({"blocks.0.magic": np.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"proj_in\.bias'\] must give shape \(128,\), got \(3,\)"):
        from_upstream({"blocks.0.proj_in.bias": np.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"unknown arguments \['flavour'\]"):
        from_upstream({}, config | {"flavour": 1})
    with pytest.raises(NotImplementedError, match="temporal_causal"):
        from_upstream({}, golden(*STAR)[2]["model"] | {"temporal_causal": 1})

"""SwiGLU of three melded weights: between the products go codes, not activations."""

import functools

import jax
import jax.numpy as jnp

from jaxeff.finetune.melded import adapter_output, after, dot, dot8, quantized8
from jaxeff.optim.falqon import Melded
from pallas_kernels.ops.gated import gated_backward, gated_forward


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def melded_mlp(
    x: jax.Array,
    probes: tuple[jax.Array, jax.Array, jax.Array],
    weights: tuple[Melded, Melded, Melded],
    scales: tuple[jax.Array, jax.Array, jax.Array],
    implementation: str | None = None,
) -> jax.Array:
    r"""``(silu(x W_g) · (x W_u)) W_d`` as three ``melded_dot`` with delayed scaling, in one piece.

    The same formulas, but the activation and its gradient are made by one pass each, which writes
    the codes that the next product reads. The backward pass finds gate and up as E4M3 codes, half
    the bytes of bfloat16.

    Args:
      x: floating ``[t, k]``.
      probes: the virtual ``B`` of gate, up and down, as for ``melded_dot``.
      weights: of gate, up and down.
      scales: float32 ``[2]`` each, as for ``melded_dot``; ``up`` takes the codes of ``x`` from
        ``gate``.
      implementation: of the two passes, see ``pallas_kernels.ops.gated``.

    Returns:
      ``[t, k]`` in the dtype of ``x``.

    >>> from jaxeff.finetune.melded import meld_weight, scales_of
    >>> melded = meld_weight(jnp.eye(4), 1)
    >>> scales, zeros = scales_of(jnp.zeros((2, 1))), jnp.zeros((4, 1))
    >>> y = melded_mlp(jnp.ones((2, 4)), (zeros,) * 3, (melded,) * 3, (scales,) * 3)
    >>> y.round(2).tolist()[0]
    [0.75, 0.75, 0.75, 0.75]
    """
    return _forward(x, probes, weights, scales, implementation)[0]


def _forward(x, probes, weights, scales, implementation):
    del probes
    gate, up, down = weights
    n = gate.shape[0]
    codes, scale, amax = quantized8(x, "fp8_e4m3", scales[0][0])
    scale = after(scale, amax)
    outs, units, low = [], [], []
    for melded in (gate, up):
        out = dot8(codes, melded.codes, (1, 1), x.dtype)  # [t, n + r]
        o_a, unit = adapter_output(out, n, scale * melded.scale, x.dtype)
        outs, units, low = [*outs, out], [*units, unit], [*low, o_a]
    units = jnp.stack([*units, scales[2][0]])
    codes, *kept, top = gated_forward(*outs, units, n, implementation=implementation)
    out = dot8(codes, down.codes, (1, 1), x.dtype)
    o_a, scale = adapter_output(out, down.shape[0], scales[2][0] * down.scale, x.dtype)
    y = (out[:, : down.shape[0]] * scale).astype(x.dtype)
    return y, (kept, [*low, o_a], (amax, top), weights, scales)


def _backward(implementation, residuals, d):
    kept, low, (amax_x, amax_y), weights, scales = residuals
    gate, up, down = weights
    codes, scale, amax_d = quantized8(d, "fp8_e5m2", scales[2][1])
    scale = after(scale, amax_d)
    dy = dot8(codes, down.codes[: down.shape[0]], (1, 0), d.dtype)  # [t, n]
    units = jnp.stack([scale * down.scale, scales[0][1], scales[1][1]])
    *codes, d_gate, d_up, tops = gated_backward(dy, *kept, units, implementation=implementation)
    probes = tuple(
        dot(each, o_a, (0, 0), jnp.float32)
        for each, o_a in zip((d_gate, d_up, d), low, strict=True)
    )
    # The gradient moves on when those are known, so that none of the three is kept for them.
    units = after(units, sum(probe[0, 0] for probe in probes))
    dx = sum(
        dot8(code, melded.codes[: melded.shape[0]], (1, 0), d.dtype) * (unit * melded.scale)
        for code, melded, unit in zip(codes, (gate, up), units[1:], strict=True)
    )
    seen = [(amax_x, tops[0]), (0.0, tops[1]), (amax_y, amax_d)]
    seen = tuple(jnp.stack([jnp.float32(a) for a in pair]) for pair in seen)
    return dx.astype(d.dtype), probes, None, seen


melded_mlp.defvjp(_forward, _backward)

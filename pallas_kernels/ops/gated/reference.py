"""SwiGLU with FP8 codes in plain jax operations: the oracle, and what runs without the kernel."""

import jax
import jax.numpy as jnp

_E4M3, _E5M2 = (jnp.float8_e4m3fn, 448.0), (jnp.float8_e5m2, 57344.0)


def gated_forward(gate: jax.Array, up: jax.Array, units: jax.Array, columns: int):
    """See ``pallas_kernels.ops.gated.gated_forward``.

    >>> one = jnp.ones((1, 1))
    >>> codes, *_ = gated_forward(one, one, jnp.float32([1, 2, 0.5]), 1)
    >>> codes.tolist()  # 2 silu(1) = 1.46, in halves
    [[3.0]]
    """
    gate = gate[:, :columns].astype(jnp.float32) * units[0]
    up = up[:, :columns].astype(jnp.float32) * units[1]
    product = gate * jax.nn.sigmoid(gate) * up
    codes = _coded(product, 1 / units[2], _E4M3)
    return codes, _coded(gate, 1.0, _E4M3), _coded(up, 1.0, _E4M3), _top(product)


def gated_backward(d: jax.Array, gate: jax.Array, up: jax.Array, units: jax.Array):
    """See ``pallas_kernels.ops.gated.gated_backward``.

    >>> one = jnp.ones((1, 1))
    >>> gated_backward(one, 0 * one, one, jnp.float32([1, 1, 1]))[2].tolist()
    [[0.5]]
    """
    kind = d.dtype
    d, gate, up = (x.astype(jnp.float32) for x in (d, gate, up))
    d = d * units[0]
    slope = jax.nn.sigmoid(gate)
    d_up = d * (gate * slope)
    d_gate = d * up * (slope + gate * slope * (1 - slope))
    codes = [_coded(x, 1 / u, _E5M2) for x, u in ((d_gate, units[1]), (d_up, units[2]))]
    return *codes, d_gate.astype(kind), d_up.astype(kind), jnp.stack([_top(d_gate), _top(d_up)])


def _coded(x, factor, kind):
    dtype, largest = kind
    return jnp.clip(x * factor, -largest, largest).astype(dtype)


def _top(x):
    return jnp.max(jnp.abs(x), initial=0.0)

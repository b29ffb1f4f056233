"""Public entry: SwiGLU between products of FP8 codes."""

import jax

from pallas_kernels._device import Device, current_device
from pallas_kernels.ops.gated import reference

_ROWS, _COLUMNS = 4, 16  # that a thread of the kernel takes


def gated_forward(
    gate: jax.Array,
    up: jax.Array,
    units: jax.Array,
    columns: int,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""``silu(gate) · up`` as codes for the next product, and what its gradient needs, in one pass.

    Read: 4 bytes a value; written: 3. In the operands' dtype, with a pass for the largest magnitude
    and one for the codes, it would be 4 + 2 and 2 + 1, and 4 bytes would be kept for the backward
    pass in place of 2. No gradient flows; ``gated_backward`` is it.

    Args:
        gate: floating ``[t, n + r]``, a product of codes; the columns from ``columns`` on are not
            read.
        up: like ``gate``.
        units: float32 ``[3]``: what 1 means in ``gate``, in ``up`` and in the result's codes.
        columns: ``n``.
        implementation: None, ``"mosaic"`` (Hopper, bfloat16, 4 | t, 16 | n) or ``"xla"``; None
            takes the kernel where it serves the call and there is one device.

    Returns:
        E4M3 codes ``[t, n]`` of the product; of the gate and of ``up``, whose codes mean their
        value (range 448, steps of 1/16 relative, 1/1024 at least); and the product's largest
        magnitude, float32.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        NotImplementedError: the kernel does not serve the call.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((4, 16), jnp.bfloat16)
    >>> codes, gate, up, top = gated_forward(x, x, jnp.float32([1, 1, 1 / 64]), 16)
    >>> codes[0, 0].item(), gate[0, 0].item(), round(float(top), 3)
    (48.0, 1.0, 0.731)
    """
    if gate.ndim != 2 or gate.shape != up.shape or not 0 < columns <= gate.shape[1]:
        raise ValueError(
            f"gate and up must be [t, n + r] with n = {columns}, got {gate.shape} and {up.shape}"
        )
    gate, up, units = jax.lax.stop_gradient((gate, up, units))
    if _chosen(implementation, gate, columns):
        from pallas_kernels.ops.gated import mosaic_sm90  # needs Mosaic: not at import time

        return mosaic_sm90.gated_forward(gate, up, units, columns)
    return reference.gated_forward(gate, up, units, columns)


def gated_backward(
    d: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    units: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Gradients of ``gate`` and ``up``, as codes for products and in the dtype of ``d``.

    .. math::
      \bar g = \bar y\, u\, \sigma(g) (1 + g (1 - \sigma(g))), \qquad
      \bar u = \bar y\, g\, \sigma(g)

    Args:
        d: floating ``[t, n]``, the product's gradient, itself a product of codes.
        gate: E4M3 ``[t, n]`` from ``gated_forward``.
        up: likewise.
        units: float32 ``[3]``: what 1 means in ``d``, and in the codes of the two gradients.
        implementation: as for ``gated_forward``.

    Returns:
        E5M2 codes of the gradients of gate and up, the two in the dtype of ``d``, and their largest
        magnitudes, float32 ``[2]``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        NotImplementedError: the kernel does not serve the call.

    >>> import jax.numpy as jnp
    >>> d, gate = jnp.ones((4, 16), jnp.bfloat16), jnp.zeros((4, 16), jnp.float8_e4m3fn)
    >>> codes, _, d_gate, _, tops = gated_backward(d, gate, gate + 1, jnp.float32([1, 0.25, 1]))
    >>> codes[0, 0].item(), d_gate[0, 0].item(), tops.tolist()
    (2.0, 0.5, [0.5, 0.0])
    """
    if d.ndim != 2 or not d.shape == gate.shape == up.shape:
        raise ValueError(
            f"d, gate and up must be one shape [t, n], got {d.shape}, {gate.shape}, {up.shape}"
        )
    d, gate, up, units = jax.lax.stop_gradient((d, gate, up, units))
    if _chosen(implementation, d, d.shape[1]):
        from pallas_kernels.ops.gated import mosaic_sm90  # needs Mosaic: not at import time

        return mosaic_sm90.gated_backward(d, gate, up, units)
    return reference.gated_backward(d, gate, up, units)


def unsupported_reason(shape: tuple[int, int], columns: int, dtype: str, device: Device):
    """Why the kernels cannot serve a call; None if they can.

    >>> from pallas_kernels._device import describe
    >>> unsupported_reason((6, 32), 32, "bfloat16", describe("gpu", "NVIDIA H200"))
    'the gated kernels take rows in fours and columns in sixteens; got [6, 32], columns 32'
    """
    if device.platform != "gpu":
        return f"the gated kernels need an NVIDIA GPU (sm90); this device is a {device.platform}"
    if device.sm != "sm90":
        return f"the gated kernels are for sm90, not {device.sm}"
    if dtype != "bfloat16":
        return f"the gated kernels take bfloat16; got {dtype}"
    if shape[0] % _ROWS or columns % _COLUMNS or shape[1] % 8:
        return (
            "the gated kernels take rows in fours and columns in sixteens; got "
            f"{list(shape)}, columns {columns}"
        )
    return None


def _chosen(implementation: str | None, x: jax.Array, columns: int) -> bool:
    """Whether the kernel runs."""
    if implementation not in (None, "mosaic", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic' or 'xla', got {implementation!r}")
    reason = unsupported_reason(x.shape, columns, str(x.dtype), current_device())
    if implementation == "mosaic" and reason is not None:
        raise NotImplementedError(reason)
    # On several devices XLA splits plain operations; the kernel runs on one.
    by_itself = implementation is None and reason is None and jax.device_count() == 1
    return implementation == "mosaic" or by_itself

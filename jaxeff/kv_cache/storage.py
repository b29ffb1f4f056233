"""How a cache stores its numbers: float types, and formats with scales beside the codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

FLOAT_STORES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class StoreFormat:
    """One quantised storage format of a cache.

    Args:
        qtype: name of the number format in ``pallas_kernels``.
        tile: values of a head that share a scale; ``None``: the whole head.
        packed: two codes share a byte.
        smooth: keys are stored minus their mean over the tokens of the first update.
        asymmetric: a tile has a zero point beside its scale.

    Examples:
        >>> STORES["nvfp4"].tile
        16

    References:
        KVzip (arXiv 2505.23416), section 4.2; SageAttention (arXiv 2410.02367), section 4.2 (smooth
        keys); NVFP4: arXiv 2509.25149, appendix B.
    """

    qtype: str
    tile: int | None = None
    packed: bool = False
    smooth: bool = False
    asymmetric: bool = False


STORES: dict[str, StoreFormat] = {
    "int8": StoreFormat("int8"),
    "int8_smooth": StoreFormat("int8", smooth=True),
    "fp8_e4m3": StoreFormat("fp8_e4m3"),
    "int4": StoreFormat("int4", tile=128, packed=True, asymmetric=True),
    "nvfp4": StoreFormat("nvfp4", tile=16, packed=True),
}
_ALIASES = {"fp8": "fp8_e4m3"}


def store_name(dtype: Any) -> str:
    """Return the canonical name of a storage format, or say which ones exist.

    Args:
        dtype: a float dtype, its name, or the name of a quantised format.

    Returns:
        One of ``float32, bfloat16, float16, int8, int8_smooth, fp8_e4m3, int4, nvfp4``.

    Raises:
        ValueError: for anything else.

    Examples:
        >>> store_name(jnp.bfloat16), store_name("int8"), store_name("fp8")
        ('bfloat16', 'int8', 'fp8_e4m3')

    References:
        KVzip (arXiv 2505.23416), section 4.2 (quantised caches).
    """
    name = _ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not (isinstance(name, str) and name in STORES):
        try:
            name = jnp.dtype(name).name
        except TypeError:
            name = str(name)
    if name not in (*FLOAT_STORES, *STORES):
        known = ", ".join((*FLOAT_STORES, *STORES))
        raise ValueError(f"dtype={name!r} is not a cache storage format; known: {known}")
    return name


def check_head_dim(store: str, head_dim: int) -> None:
    """Say whether heads of this size can be stored in a format.

    Args:
        store: a name from :func:`store_name`.
        head_dim: ``H``.

    Raises:
        ValueError: if a packed format's tile does not divide the head.

    Examples:
        >>> check_head_dim("nvfp4", 32)

    References:
        NVFP4: arXiv 2509.25149, appendix B (blocks of 16).
    """
    form = STORES.get(store)
    if form is None or not form.packed:
        return
    tile = min(form.tile or head_dim, head_dim)
    if head_dim % 2 or head_dim % tile:
        raise ValueError(
            f"head_dim={head_dim} must be {'even' if head_dim % 2 else f'a multiple of {tile}'} "
            f"to be stored as {store}"
        )


def float_dtype(store: str) -> Any:
    """Return the float type beside a storage format: itself, or bf16 for quantised ones.

    Examples:
        >>> float_dtype("int8").name
        'bfloat16'

    References:
        KVzip (arXiv 2505.23416), section 4.2.
    """
    return jnp.dtype(store) if store in FLOAT_STORES else jnp.dtype(jnp.bfloat16)


def encode(x: jax.Array, store: str) -> Any:
    """Return ``x [..., H]`` as it is stored: a float array, or a QTensor with scales along ``H``.

    Every vector is encoded by itself, so entries can be moved without decoding them.

    Args:
        x: float ``[..., H]``.
        store: a name from :func:`store_name`.

    Returns:
        An array, or a ``QTensor`` whose arrays share the leading axes of ``x``.

    Examples:
        >>> encode(jnp.ones((2, 32)), "int4").qvalue.shape
        (2, 16)

    References:
        KVzip (arXiv 2505.23416), section 4.2.
    """
    if store in FLOAT_STORES:
        return x.astype(store)
    from pallas_kernels import quantize

    form = STORES[store]
    tile = form.tile if form.tile is None else min(form.tile, x.shape[-1])
    # A scale of the whole cache would change with every token; nvfp4 does without its second one.
    options = {"two_level": False} if form.qtype == "nvfp4" else {"asymmetric": form.asymmetric}
    codes = quantize(x.astype(jnp.float32), form.qtype, axis=-1, tile=tile, **options)
    return codes.pack(-1) if form.packed else codes


def decode(x: Any, dtype: Any = None) -> jax.Array:
    """Return what :func:`encode` stored, as a float array.

    Args:
        x: an array or a ``QTensor``.
        dtype: float dtype of the result; ``None``: the stored one (f32 if quantised).

    Returns:
        float ``[..., H]``.

    Examples:
        >>> decode(encode(jnp.ones((1, 4)), "int8")).tolist()
        [[1.0, 1.0, 1.0, 1.0]]

    References:
        KVzip (arXiv 2505.23416), section 4.2.
    """
    if isinstance(x, jax.Array):
        return x if dtype is None else x.astype(dtype)
    return x.dequantize(jnp.float32 if dtype is None else dtype)

"""QTensor: a quantised array that is an ordinary pytree."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.block_format import get_format
from pallas_kernels.formats.number_types import IntType
from pallas_kernels.formats.packing import FOUR_BIT_DTYPES, pack_codes, unpack_codes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point", "tensor_scale"],
    meta_fields=["qtype", "packed_axis", "padding"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes and the scales that give them meaning.

    value = (qvalue - zero_point) · scale · tensor_scale, each factor 1 (0 for zero_point) if
    absent.

    ``scale`` has the rank of the value and each of its dims divides the stored dim: one rule covers
    per tensor, per channel and per tile. The first four fields are those of ``qwix.QArray``. All
    static fields count axes from the end, so a leading axis added by ``vmap`` changes nothing.

    Building a QTensor checks nothing, because jax puts placeholders into pytrees; call
    ``validate``.

    Args:
        qvalue: codes; int8, int4, float8_e4m3fn, ...; uint8 if packed.
        scale: decode scale per tile, floating; NaN marks a tile that held NaN or inf.
        zero_point: float32 shift in code units, shape of ``scale``, for asymmetric integers.
        qtype: name of the format, see ``get_format``.
        tensor_scale: float32 scale of the whole tensor, each dim 1 (two-level formats).
        packed_axis: negative axis along which two 4-bit codes share a byte, or ``None``.
        padding: zeros stored at the end of the trailing axes so that tiles divide them; one count
            for each of the last ``len(padding)`` axes.

    >>> qt = QTensor(jnp.int8([[2, -4]]), jnp.float32([[0.5]]), qtype="int8")
    >>> qt.validate().dequantize().tolist(), qt.shape, qt.nbytes
    ([[1.0, -2.0]], (1, 2), 6)
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: str = "int8"
    tensor_scale: jax.Array | None = None
    packed_axis: int | None = None
    padding: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the codes when unpacked, padding included."""
        shape = list(self.qvalue.shape)
        if self.packed_axis is not None:
            shape[self.packed_axis] *= 2
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        padding = (0,) * (self.ndim - len(self.padding)) + self.padding
        return tuple(stored - pad for stored, pad in zip(self.stored_shape, padding, strict=True))

    @property
    def ndim(self) -> int:
        """Number of dimensions of the value."""
        return len(self.qvalue.shape)

    @property
    def size(self) -> int:
        """Number of values, without padding."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, scales and padding included; an unpacked 4-bit code takes one."""
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The value as a plain array.

        (qvalue - zero_point) · scale first, then · tensor_scale, in float32.

        Args:
            dtype: floating dtype of the result; an overflow follows a cast to it.

        Returns:
            Array of ``dtype`` with shape ``self.shape``; a tile whose scale is NaN is NaN.

        Raises:
            ValueError: ``dtype`` is not floating.

        >>> qt = QTensor(jnp.int8([3, 4]), jnp.float32([2.0]), jnp.float32([1.0]))
        >>> qt.dequantize().tolist()
        [4.0, 6.0]
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be floating, got {jnp.dtype(dtype)}")
        unpacked = self.unpack()
        tiles = split_tiles(unpacked.qvalue.astype(jnp.float32), self.scale.shape)
        if self.zero_point is not None:
            tiles = tiles - _one_per_tile(self.zero_point)
        tiles = tiles * _one_per_tile(self.scale)
        value = tiles.reshape(unpacked.qvalue.shape)
        if self.tensor_scale is not None:
            value = value * self.tensor_scale
        return value[tuple(slice(0, length) for length in self.shape)].astype(dtype)

    def pack(self, axis: int = -1) -> "QTensor":
        """Stores two 4-bit codes per byte along ``axis``; 8- and 6-bit formats stay as they are.

        Args:
            axis: axis to shorten; its stored length must be even.

        Returns:
            QTensor with the same value.

        Raises:
            ValueError: the axis is out of range or odd, or the codes are packed along another axis.

        >>> qt = QTensor(jnp.array([1, -2], jnp.int4), jnp.float32([1.0]), qtype="int4")
        >>> qt.pack().qvalue.tolist(), qt.pack().nbytes
        ([225], 5)
        """
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis {axis} is out of range for {self.ndim} dimensions")
        axis = axis % self.ndim - self.ndim
        if self.packed_axis is not None and self.packed_axis != axis:
            raise ValueError(
                f"already packed along axis {self.packed_axis}: unpack before axis {axis}"
            )
        if self.packed_axis is not None or self.qvalue.dtype not in FOUR_BIT_DTYPES:
            return self
        return dataclasses.replace(self, qvalue=pack_codes(self.qvalue, axis), packed_axis=axis)

    def unpack(self) -> "QTensor":
        """Undoes ``pack``; a QTensor that is not packed is returned unchanged.

        Returns:
            QTensor with the same value, one code per element of ``qvalue``.

        >>> qt = QTensor(jnp.uint8([225]), jnp.float32([1.0]), qtype="int4", packed_axis=-1)
        >>> qt.unpack().qvalue.tolist()
        [1, -2]
        """
        if self.packed_axis is None:
            return self
        codes = unpack_codes(
            self.qvalue, get_format(self.qtype).element_type.dtype, self.packed_axis
        )
        return dataclasses.replace(self, qvalue=codes, packed_axis=None)

    def validate(self, check_values: bool = False) -> "QTensor":
        """Checks every rule of the class; returns the QTensor.

        Args:
            check_values: also check that scales are positive numbers, in the steps of the format,
                which needs concrete arrays.

        Returns:
            ``self``.

        Raises:
            ValueError: the first broken rule, with the shapes, dtypes or counts.

        >>> QTensor(jnp.zeros((2, 6), jnp.int8), jnp.ones((2, 4))).validate()
        Traceback (most recent call last):
        ...
        ValueError: scale has 4 tiles along axis 1, which does not divide the stored length 6
        """
        self._check_packing()
        self._check_dtypes()
        _check_tiling("scale", self.scale.shape, self.stored_shape)
        self._check_zero_point()
        self._check_tensor_scale()
        self._check_padding()
        if check_values:
            _check_scale_values("scale", self.scale)
            if self.tensor_scale is not None:
                _check_scale_values("tensor_scale", self.tensor_scale)
            self._check_steps()
        return self

    def _check_steps(self):
        steps = get_format(self.qtype).scale_steps
        pairs = zip(self.scale.shape, self.stored_shape, strict=True)
        axes = tuple(axis for axis, (count, length) in enumerate(pairs) if count < length)
        if steps is None or not axes or not self.scale.size:
            return
        scale = np.asarray(self.scale).astype(np.float32)
        counts = scale / scale.max(axes, keepdims=True) * steps
        wrong = (np.abs(counts - np.rint(counts)) > 1e-4) | (counts < 0.5)
        if wrong.any():
            raise ValueError(
                f"scales of {self.qtype!r} must be multiples of the largest along axes {axes} over "
                f"{steps}, but {int(wrong.sum())} of {scale.size} are not"
            )

    def _check_packing(self):
        axis = self.packed_axis
        if axis is not None and not -self.ndim <= axis <= -1:
            raise ValueError(
                f"packed_axis must be negative and at least {-self.ndim} (the rank), got {axis}"
            )

    def _check_dtypes(self):
        native = get_format(self.qtype).element_type.dtype
        if self.packed_axis is not None and native not in FOUR_BIT_DTYPES:
            raise ValueError(f"packed_axis is set, but qtype {self.qtype!r} has no 4-bit codes")
        expected = jnp.dtype(jnp.uint8) if self.packed_axis is not None else native
        if self.qvalue.dtype != expected:
            how = "packed " if self.packed_axis is not None else ""
            raise ValueError(
                f"qvalue of {how}qtype {self.qtype!r} must be {expected}, got {self.qvalue.dtype}"
            )
        if not jnp.issubdtype(self.scale.dtype, jnp.floating):
            raise ValueError(f"scale must be floating, got {self.scale.dtype}")

    def _check_zero_point(self):
        if self.zero_point is None:
            return
        if not isinstance(get_format(self.qtype).element_type, IntType):
            raise ValueError(f"zero_point is for integer formats, got qtype {self.qtype!r}")
        if self.zero_point.shape != self.scale.shape:
            raise ValueError(
                f"zero_point must have the shape of scale {self.scale.shape}, "
                f"got {self.zero_point.shape}"
            )

    def _check_tensor_scale(self):
        if self.tensor_scale is None:
            return
        if self.tensor_scale.dtype != jnp.float32:
            raise ValueError(f"tensor_scale must be float32, got {self.tensor_scale.dtype}")
        allowed = all(
            dim in (1, length)
            for dim, length in zip(self.tensor_scale.shape, self.stored_shape, strict=False)
        )
        if self.tensor_scale.ndim != self.ndim or not allowed:
            raise ValueError(
                f"tensor_scale must have rank {self.ndim} and dims of 1 (or of a batch axis), "
                f"got shape {self.tensor_scale.shape} for value {self.shape}"
            )

    def _check_padding(self):
        trailing = self.stored_shape[self.ndim - len(self.padding) :]
        fits = len(self.padding) <= self.ndim and all(
            0 <= pad <= length for pad, length in zip(self.padding, trailing, strict=True)
        )
        if not fits:
            raise ValueError(
                f"padding {self.padding} does not fit stored shape {self.stored_shape}"
            )


def _check_tiling(name: str, tiles: tuple[int, ...], stored: tuple[int, ...]) -> None:
    if len(tiles) != len(stored):
        raise ValueError(
            f"{name} must have the rank of the value, {len(stored)}; got shape {tiles} for {stored}"
        )
    for axis, (count, length) in enumerate(zip(tiles, stored, strict=True)):
        divides = length == 0 if count == 0 else length % count == 0
        if not divides:
            raise ValueError(
                f"{name} has {count} tiles along axis {axis}, which does not divide the stored "
                f"length {length}"
            )


def _check_scale_values(name: str, scale: jax.Array) -> None:
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(
            "check_values=True needs concrete arrays: call validate outside jit and vmap"
        )
    values = np.asarray(scale).astype(np.float32)
    if nans := int(np.isnan(values).sum()):
        raise ValueError(
            f"{name} holds {nans} NaN of {values.size}: the data held NaN or inf there"
        )
    if wrong := int((values <= 0).sum()):
        raise ValueError(f"{name} must be positive, but {wrong} of {values.size} are not")


def split_tiles(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Reshapes every axis of length L with ``count`` tiles to two axes ``[count, L / count]``.

    Args:
        x: array whose dims are multiples of ``counts``.
        counts: tiles per axis.

    Returns:
        Array of rank 2·ndim; reduce its odd axes for one number per tile.

    >>> split_tiles(jnp.zeros((4, 6)), (1, 3)).shape
    (1, 4, 3, 2)
    """
    pairs = (
        (count, length // max(count, 1)) for count, length in zip(counts, x.shape, strict=True)
    )
    return x.reshape(*(dim for pair in pairs for dim in pair))


def _one_per_tile(scale: jax.Array) -> jax.Array:
    expanded = (dim for count in scale.shape for dim in (count, 1))
    return scale.astype(jnp.float32).reshape(*expanded)

"""Text that every machine has, as bytes: Python's standard library, and batches of it."""

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, with the files they came from.

    Args:
      train: uint8 ``[bytes]``.
      validation: uint8 ``[bytes]``, from other files than ``train``.
      train_files: paths relative to the root, in the order of their bytes.
      validation_files: likewise.

    Example:
      >>> corpus = stdlib_corpus(max_bytes=1_000_000)
      >>> set(corpus.train_files) & set(corpus.validation_files)
      set()
    """

    train: np.ndarray
    validation: np.ndarray
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both parts, 16 hex digits: two runs with the same one saw the same bytes."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(b"|")
        digest.update(self.validation.tobytes())
        return digest.hexdigest()[:16]


def stdlib_corpus(max_bytes: int | None = None, validation: float = 0.05) -> Corpus:
    """All ``*.py`` files of the running Python's standard library, split by file.

    A file is held out if the hash of its path, read as a fraction, is below ``validation``; so the
    split does not depend on the machine, and no file is on both sides. Installed third-party
    packages are left out. About 32 MB with the standard library's tests, fewer where a
    distribution leaves them out.

    Args:
      max_bytes: upper limit on the bytes of both parts together, shared as ``validation`` says;
        whole files are dropped by an order that their hash gives. None takes all.
      validation: fraction of the files to hold out, in (0, 1).

    Returns:
      The Corpus, files in sorted order.

    Raises:
      ValueError: if an argument is out of range, or a part would be empty.

    Example:
      >>> corpus = stdlib_corpus(max_bytes=1_000_000)
      >>> corpus.train.dtype, len(corpus.train) + len(corpus.validation) <= 1_000_000
      (dtype('uint8'), True)
    """
    return directory_corpus(
        sysconfig.get_paths()["stdlib"], max_bytes=max_bytes, validation=validation
    )


def directory_corpus(
    root: str | Path,
    *,
    suffix: str = ".py",
    max_bytes: int | None = None,
    validation: float = 0.05,
    skip: tuple[str, ...] = ("site-packages", "dist-packages"),
) -> Corpus:
    """All files below a directory with one suffix, split by file as ``stdlib_corpus`` does.

    Args:
      root: directory.
      suffix: end of the file names.
      max_bytes: upper limit on the bytes of both parts together, or None.
      validation: fraction of the files to hold out, in (0, 1).
      skip: names of folders, of ``root`` itself or below it, whose files are left out.

    Returns:
      The Corpus, files in sorted order.

    Raises:
      ValueError: if an argument is out of range, or a part would be empty.
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation must lie in (0, 1), got {validation}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    root = Path(root)
    sizes = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in root.rglob(f"*{suffix}")
        if path.is_file() and not set(skip) & set(path.parts)
    }
    held_out = {name for name in sizes if _fraction(name) < validation}
    parts = []
    for names, share in ((sizes.keys() - held_out, 1 - validation), (held_out, validation)):
        limit = None if max_bytes is None else int(share * max_bytes)
        chosen = sorted(_fitting({name: sizes[name] for name in names}, limit))
        content = b"".join((root / name).read_bytes() for name in chosen)
        if not content:
            raise ValueError(
                f"{root} has {len(sizes)} files ending in {suffix!r}, {len(held_out)} of them held "
                f"out; with validation={validation}, max_bytes={max_bytes} one part has no bytes"
            )
        parts.append((np.frombuffer(content, np.uint8), tuple(chosen)))
    (train, train_files), (val, val_files) = parts
    return Corpus(train, val, train_files, val_files)


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _fitting(sizes: dict[str, int], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return list(sizes)
    # In an order without meaning, so that a small corpus is not the first letters of the alphabet.
    chosen, total = [], 0
    for name in sorted(sizes, key=lambda name: _fraction("order:" + name)):
        if total + sizes[name] <= max_bytes:
            chosen.append(name)
            total += sizes[name]
    return chosen


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless random windows of a byte array; batch ``i`` depends on ``seed`` and ``i`` alone.

    Iterating always starts at batch ``start``; ``skip`` gives the same stream from a later step
    without drawing the batches in between.

    Args:
      array: uint8 or integer ``[length]``.
      batch: windows per batch.
      seq_len: input tokens per window; a window holds one more, the last target.
      seed: seed of the window positions.
      start: index of the first batch.

    Example:
      >>> stream = Batches(np.arange(100, dtype=np.uint8), batch=2, seq_len=8, seed=0)
      >>> first, second = stream[0], stream[1]
      >>> first.shape, bool((next(iter(stream.skip(1))) == second).all())
      ((2, 9), True)
    """

    array: np.ndarray
    batch: int
    seq_len: int
    seed: int = 0
    start: int = 0

    def __post_init__(self):
        if self.array.ndim != 1 or not np.issubdtype(self.array.dtype, np.integer):
            raise ValueError(
                f"array must be integers [length], got {self.array.dtype} {list(self.array.shape)}"
            )
        for name in ("batch", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.array) < self.seq_len + 1:
            raise ValueError(
                f"array has {len(self.array)} tokens; seq_len={self.seq_len} needs at least "
                f"{self.seq_len + 1}"
            )

    def __getitem__(self, index: int) -> np.ndarray:
        """Batch ``index``: int32 ``[batch, seq_len + 1]``."""
        generator = np.random.default_rng((self.seed, index))
        starts = generator.integers(0, len(self.array) - self.seq_len, self.batch)
        return self.array[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        index = self.start
        while True:
            yield self[index]
            index += 1

    def skip(self, count: int) -> "Batches":
        """The stream from ``count`` batches later."""
        return dataclasses.replace(self, start=self.start + count)


def batches(array: np.ndarray, batch: int, seq_len: int, seed: int = 0) -> Batches:
    """Endless stream of random windows, the same for the same seed.

    Args:
      array: integers ``[length]``.
      batch: windows per batch.
      seq_len: input tokens per window.
      seed: seed of the window positions.

    Returns:
      An iterable of int32 ``[batch, seq_len + 1]``; ``[:, :-1]`` are inputs, ``[:, 1:]`` targets.

    Raises:
      ValueError: if the array is shorter than a window, or a size is not positive.

    Example:
      >>> next(iter(batches(np.arange(50), batch=3, seq_len=4))).shape
      (3, 5)
    """
    return Batches(array, batch, seq_len, seed)


def compressed_bits_per_byte(array: np.ndarray, method: str = "gzip") -> float:
    """Bits per byte that a general-purpose compressor needs, for comparison with a model.

    Args:
      array: uint8 ``[bytes]``.
      method: ``"gzip"`` (level 9), ``"bz2"`` or ``"lzma"``.

    Returns:
      8 × compressed bytes / bytes.

    Raises:
      ValueError: for an unknown method or an empty array.

    Example:
      >>> compressed_bits_per_byte(np.zeros(100_000, np.uint8)) < 0.1
      True
    """
    compress = {
        "gzip": lambda data: gzip.compress(data, 9),
        "bz2": bz2.compress,
        "lzma": lzma.compress,
    }
    if method not in compress:
        raise ValueError(f"method must be one of {sorted(compress)}, got {method!r}")
    if array.dtype != np.uint8 or not array.size:
        raise ValueError(f"array must be non-empty uint8, got {array.dtype} {list(array.shape)}")
    return 8 * len(compress[method](array.tobytes())) / array.size

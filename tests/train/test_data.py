"""The corpus and its batches: deterministic, split by file, in range."""

import numpy as np
import pytest

from jaxeff.data import batches, compressed_bits_per_byte, directory_corpus, stdlib_corpus


def test_stdlib_corpus():
    corpus, again = (stdlib_corpus(max_bytes=2_000_000) for _ in range(2))
    assert corpus.fingerprint == again.fingerprint
    assert 1_000_000 < len(corpus.train) + len(corpus.validation) <= 2_000_000
    assert not set(corpus.train_files) & set(corpus.validation_files)
    assert list(corpus.train_files) == sorted(corpus.train_files)
    assert not any("site-packages" in name for name in corpus.train_files)
    assert b"import" in corpus.train.tobytes()


def test_directory_corpus(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.txt").write_bytes(bytes([index]) * 10)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.txt").write_bytes(b"third party")
    corpus = directory_corpus(tmp_path, suffix=".txt", validation=0.3)
    assert len(corpus.train) + len(corpus.validation) == 600
    assert 5 <= len(corpus.validation_files) <= 31
    held_out = {int(name.removesuffix(".txt")) for name in corpus.validation_files}
    assert set(np.unique(corpus.validation)) == held_out
    with pytest.raises(ValueError, match="has 0 files ending in '.md'"):
        directory_corpus(tmp_path, suffix=".md")
    with pytest.raises(ValueError, match=r"validation must lie in \(0, 1\), got 0"):
        directory_corpus(tmp_path, validation=0)
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        directory_corpus(tmp_path, max_bytes=0)


def test_batches():
    stream = batches(np.arange(30, dtype=np.int64), batch=4, seq_len=5, seed=3)
    first = stream[0]
    assert first.shape == (4, 6) and first.dtype == np.int32
    assert (np.diff(first, axis=1) == 1).all() and first.max() <= 29
    np.testing.assert_array_equal(next(iter(stream)), first)
    assert (stream[1] != first).any()
    np.testing.assert_array_equal(next(iter(stream.skip(7))), stream[7])
    other = batches(np.arange(30), batch=4, seq_len=5, seed=4)[0]
    assert (other != first).any()
    # Every start, the last one included, is drawn.
    starts = {int(row[0]) for index in range(50) for row in stream[index]}
    assert starts == set(range(25))


def test_batches_refuse():
    with pytest.raises(ValueError, match="array has 5 tokens; seq_len=5 needs at least 6"):
        batches(np.arange(5), 1, 5)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        batches(np.arange(9), 0, 5)
    with pytest.raises(ValueError, match=r"array must be integers \[length\], got float64 \[9\]"):
        batches(np.zeros(9), 1, 5)


def test_compressed_bits_per_byte():
    noise = np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8)
    for method in ("gzip", "bz2", "lzma"):
        assert 7.9 < compressed_bits_per_byte(noise, method) < 8.2
    with pytest.raises(ValueError, match="method must be one of"):
        compressed_bits_per_byte(noise, "zip")
    with pytest.raises(ValueError, match="array must be non-empty uint8"):
        compressed_bits_per_byte(noise[:0])

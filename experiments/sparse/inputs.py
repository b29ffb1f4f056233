"""Queries, keys and values with the structure that sparse attention lives on.

White noise has none: every tile matters the same. The generators here make the two structures
that trained models show: smoothness in space and time (video), and locality, sinks and topics
(text). They are stand-ins; the README says what they cannot show.
"""

from collections.abc import Sequence

import numpy as np


def video(
    shape: Sequence[int], *, num_heads: int, head_dim: int, sharpness: float = 12.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heads that look near in space and time and at similar content.

    ``q_t · k_s / sqrt(H) ≈ sharpness · (exp(-|x_t - x_s|² / 2ℓ_n²) + c_t · c_s)`` from random
    Fourier features of the position x (a length ℓ_n per head) and a content c of moving blobs.

    Args:
        shape: ``(frames, height, width)``, tokens, row-major.
        num_heads: N.
        head_dim: H, even.
        sharpness: size of the logits.
        seed: seed of everything.

    Returns:
        float32 query, key, value ``[1, T, N, H]``.
    """
    rng = np.random.default_rng(seed)
    position = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    position = position.reshape(-1, len(shape)).astype(np.float64)  # [T, 3]
    content = _blobs(shape, position, rng)  # [T, C]
    lengths = np.geomspace(1.5, 0.4 * max(shape), num_heads)
    queries, keys, values = [], [], []
    for length in lengths:
        frequency = rng.normal(size=(len(shape), head_dim // 2)) / length
        phase = position @ frequency
        near = np.concatenate([np.cos(phase), np.sin(phase)], -1) / np.sqrt(head_dim / 2)
        mix = rng.normal(size=(content.shape[1], head_dim)) / np.sqrt(head_dim)
        feature = near + 0.5 * content @ mix
        size = np.sqrt(sharpness * np.sqrt(head_dim))
        noise = lambda: 0.05 * rng.normal(size=feature.shape)  # noqa: B023, E731
        queries.append(size * (feature + noise()))
        keys.append(size * (feature + noise()) + rng.normal(size=head_dim))  # keys have a bias
        detail = 0.5 * rng.normal(size=feature.shape)  # what makes a token unlike its neighbours
        values.append(content @ rng.normal(size=(content.shape[1], head_dim)) + feature + detail)
    return tuple(np.stack(x, 1)[None].astype(np.float32) for x in (queries, keys, values))


def _blobs(shape, position, rng, number: int = 6) -> np.ndarray:
    """Soft membership of every token in a few blobs that move from frame to frame; [T, number]."""
    size = np.asarray(shape[1:], np.float64)
    start, speed = rng.random((number, 2)) * size, rng.normal(size=(number, 2)) * 0.5
    centre = start + position[:, :1, None] * speed  # [T, number, 2]
    distance = ((position[:, None, 1:] - centre) ** 2).sum(-1)
    return np.exp(-distance / (2 * (0.2 * size.min()) ** 2))


def text(
    tokens: int, *, num_heads: int, head_dim: int, sharpness: float = 12.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Causal heads that look at the near past, at the first token and at the same topic.

    Topics hold for stretches of about 128 tokens and come back. Head n mixes a recency kernel of
    its own length with the topic's similarity; the first key is a sink.

    Args:
        tokens: T.
        num_heads: N.
        head_dim: H, even.
        sharpness: size of the logits.
        seed: seed of everything.

    Returns:
        float32 query, key, value ``[1, T, N, H]``.
    """
    rng = np.random.default_rng(seed)
    changes = np.cumsum(rng.random(tokens) < 1 / 128)
    topic = rng.integers(0, 12, changes.max() + 1)[changes]  # [T]
    topics = rng.normal(size=(12, head_dim)) / np.sqrt(head_dim)
    words = rng.normal(size=(200, head_dim)) / np.sqrt(head_dim)
    word = rng.zipf(1.3, tokens) % 200
    position = np.arange(tokens)[:, None]
    queries, keys, values = [], [], []
    for n, length in enumerate(np.geomspace(8, tokens / 4, num_heads)):
        frequency = rng.normal(size=head_dim // 2) / length
        phase = position * frequency
        near = np.concatenate([np.cos(phase), np.sin(phase)], -1) / np.sqrt(head_dim / 2)
        share = n / max(1, num_heads - 1)  # from recency to topics
        feature = (1 - 0.7 * share) * near + (0.3 + 0.7 * share) * topics[topic]
        query = feature + 0.2 * words[word]
        key = feature + 0.2 * words[word]
        key[0] = 1.5 * query.mean(0) / np.linalg.norm(query.mean(0))  # the sink
        size = np.sqrt(sharpness * np.sqrt(head_dim))
        queries.append(size * query)
        keys.append(size * key + rng.normal(size=head_dim))
        values.append(words[word] * np.sqrt(head_dim) + 0.5 * rng.normal(size=feature.shape))
    return tuple(np.stack(x, 1)[None].astype(np.float32) for x in (queries, keys, values))

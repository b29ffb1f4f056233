"""Data of the two tasks: linear regression on one relevant token, and associative recall.

All generators are pure functions of a key. Sizes are static; ``num_pairs``, ``vocab_size``, ``dim``
and ``length`` may be traced numbers below the static maxima, so that one compiled program serves
many configurations: padding sits after the read-out position (which causal attention cannot see),
in unused vocabulary entries, or in zero dimensions.

Reference: Zucchet et al., arXiv 2505.17863, sections 2.1, 2.4, 3.1 and appendix C.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DESIGNATED_TOKENS = (0, 1)


class LinearBatch(NamedTuple):
    """Sequences of the linear task.

    Attributes:
        inputs: ``[b, T, d]`` float32 tokens.
        relevant: ``[b, T]`` bool, True on the B positions that hold the relevant token.
        targets: ``[b, d]`` float32, ``W* x_relevant``.
    """

    inputs: jax.Array
    relevant: jax.Array
    targets: jax.Array


class RecallBatch(NamedTuple):
    """Sequences ``k_1 v_1 … k_N v_N q`` of the recall task.

    Attributes:
        tokens: ``[b, 2 max_pairs + 1]`` int32; zeros after the query if there is padding.
        targets: ``[b]`` int32, the value that belongs to the query.
        is_query: ``[b, max_pairs]`` bool, slots that hold the query's pair.
        query_position: ``[]`` int32, ``2 num_pairs``: where the query stands and is answered.
    """

    tokens: jax.Array
    targets: jax.Array
    is_query: jax.Array
    query_position: jax.Array


def _check_static(name: str, value, low, high) -> None:
    """Check a number that is known now; traced numbers are the caller's promise."""
    if isinstance(value, jax.core.Tracer):
        return
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {value}")


def target_matrix(key: jax.Array, dim: int, *, max_dim: int | None = None) -> jax.Array:
    """Draw ``W*`` with entries N(0, 1/dim), zero in padded rows and columns.

    Args:
        key: PRNG key.
        dim: Dimension of a token, at least 1; may be traced if ``max_dim`` is given.
        max_dim: Static size of the result; ``dim`` by default.

    Returns:
        ``[max_dim, max_dim]`` float32.

    >>> target_matrix(jax.random.key(0), 3, max_dim=4).shape
    (4, 4)
    """
    size = dim if max_dim is None else max_dim
    _check_static("dim", dim, 1, size)
    inside = jnp.arange(size) < dim
    w = jax.random.normal(key, (size, size)) / jnp.sqrt(jnp.float32(dim))
    return w * (inside[:, None] & inside)


def linear_batch(
    key: jax.Array,
    target: jax.Array,
    *,
    batch_size: int,
    seq_len: int,
    B: int = 1,
    p: float = 0.0,
    dim: int | None = None,
    length: int | None = None,
    random_positions: bool = True,
) -> LinearBatch:
    """Draw sequences whose target depends on one token only.

    Tokens are i.i.d. N(0, I/d). B positions hold the same relevant vector, which with probability
    ``p`` is the fixed unit vector e_1 instead of a fresh one (cross-sample repetition).

    Args:
        key: PRNG key.
        target: ``[D, D]`` float32, ``W*``, zero beyond ``dim``.
        batch_size: Sequences b, at least 1.
        seq_len: Static number T of tokens.
        B: Relevant positions in a sequence, in 1..length; may be traced.
        p: Probability of the repeated vector, in [0, 1]; may be traced.
        dim: Dimensions in use, at most D; all by default; may be traced.
        length: Tokens in use, at most ``seq_len``; all by default; may be traced. Relevant
            positions lie in the first ``length`` tokens.
        random_positions: Draw the relevant positions afresh for each sequence; otherwise they are
            the last B, as in the toy model.

    Returns:
        A :class:`LinearBatch`.

    Raises:
        ValueError: If a number is out of its range.

    >>> batch = linear_batch(jax.random.key(0), jnp.eye(4), batch_size=2, seq_len=8, B=3)
    >>> batch.inputs.shape, batch.relevant.sum(1).tolist()
    ((2, 8, 4), [3, 3])

    Reference: sections 2.1, 2.3, 2.4.
    """
    size = target.shape[0]
    dim = size if dim is None else dim
    length = seq_len if length is None else length
    _check_static("batch_size", batch_size, 1, 1 << 30)
    _check_static("dim", dim, 1, size)
    _check_static("length", length, 1, seq_len)
    _check_static("B", B, 1, length if not isinstance(length, jax.core.Tracer) else seq_len)
    _check_static("p", p, 0.0, 1.0)

    # Few, large draws: every call of the generator costs compile time.
    key_x, key_u = jax.random.split(key)
    inside = jnp.arange(size) < dim
    scale = inside / jnp.sqrt(jnp.float32(dim))
    drawn = jax.random.normal(key_x, (batch_size, seq_len + 1, size)) * scale
    x, fresh = drawn[:, :-1], drawn[:, -1]  # [b, T, D], [b, D]
    uniform = jax.random.uniform(key_u, (batch_size, seq_len + 1))
    vector = jnp.where(uniform[:, -1:] < p, jax.nn.one_hot(0, size), fresh)
    # The B positions of lowest rank are relevant; padding ranks last.
    order = jnp.broadcast_to(-jnp.arange(seq_len, dtype=jnp.float32), (batch_size, seq_len))
    if random_positions:
        order = uniform[:, :-1]
    order = jnp.where(jnp.arange(seq_len) < length, order, jnp.inf)
    relevant = jnp.argsort(jnp.argsort(order, axis=1), axis=1) < B  # [b, T]
    inputs = jnp.where(relevant[:, :, None], vector[:, None, :], x)
    return LinearBatch(inputs, relevant, vector @ target.T)


def recall_batch(
    key: jax.Array,
    *,
    batch_size: int,
    num_pairs: int,
    vocab_size: int,
    B: float = 1.0,
    p: float = 0.0,
    max_pairs: int | None = None,
    max_vocab: int | None = None,
    literal_bernoulli: bool = False,
) -> RecallBatch:
    """Draw associative-recall sequences.

    A fresh permutation of the vocabulary maps keys to values. The query is each of two designated
    tokens with probability ``p/2 + (1−p)/V`` and every other token with ``(1−p)/V``. The query's
    pair takes one uniformly chosen slot, and each other slot independently with probability
    ``(B−1)/(N−1)``, so it is never missing and occurs B times on average. The remaining slots hold
    distinct other keys with their values.

    Args:
        key: PRNG key.
        batch_size: Sequences b, at least 1.
        num_pairs: Slots N, 1 to V; may be traced if ``max_pairs`` is given.
        vocab_size: Tokens V, at least 2; keys and values share them; may be traced if
            ``max_vocab`` is given.
        B: Mean number of slots with the query's pair, in [1, N]; may be traced.
        p: Cross-sample repetition, in [0, 1]; may be traced.
        max_pairs: Static number of slots; ``num_pairs`` by default.
        max_vocab: Static number of tokens; ``vocab_size`` by default.
        literal_bernoulli: Fill each slot with the query's pair with probability ``B/N`` and nothing
            else, as appendix C.1 prints; the query is then absent from about e^{−B} of the
            sequences, so its value cannot be told. B may lie in [0, N]; needs N < V.

    Returns:
        A :class:`RecallBatch`.

    Raises:
        ValueError: If a number is out of its range.

    >>> batch = recall_batch(jax.random.key(0), batch_size=3, num_pairs=4, vocab_size=8)
    >>> batch.tokens.shape, batch.is_query.sum(1).tolist(), int(batch.query_position)
    ((3, 9), [1, 1, 1], 8)

    Reference: section 3.1 and appendix C.1; one certain slot is our reading (the figures reach
    100 % accuracy, which the printed rule cannot).
    """
    slots = num_pairs if max_pairs is None else max_pairs
    vocab = vocab_size if max_vocab is None else max_vocab
    _check_static("batch_size", batch_size, 1, 1 << 30)
    _check_static("vocab_size", vocab_size, 2, float("inf") if max_vocab is None else vocab)
    limit = vocab if isinstance(vocab_size, jax.core.Tracer) else int(vocab_size)
    _check_static("num_pairs", num_pairs, 1, min(slots, limit - int(literal_bernoulli)))
    most = slots if isinstance(num_pairs, jax.core.Tracer) else int(num_pairs)
    _check_static("B", B, 0.0 if literal_bernoulli else 1.0, most)
    _check_static("p", p, 0.0, 1.0)

    token, slot = jnp.arange(vocab), jnp.arange(slots)
    # One draw, cut into its uses: every call of the generator costs compile time.
    uniform = jax.random.uniform(key, (batch_size, 2 * vocab + slots + 4))
    noise_map, noise_other, draw, scalars = jnp.split(
        uniform, [vocab, 2 * vocab, 2 * vocab + slots], axis=1
    )

    def whole(u, count):
        """Uniform whole number below ``count`` from a uniform number in [0, 1)."""
        return jnp.minimum(jnp.floor(u * count).astype(jnp.int32), count - 1)

    def shuffled(noise, allowed):
        """Random order of the allowed entries, then the others."""
        return jnp.argsort(jnp.where(allowed, noise, jnp.inf), axis=1)

    mapping = shuffled(noise_map, token < vocab_size)  # [b, V]
    # p_query = p · uniform(designated) + (1−p) · uniform(vocabulary).
    designated = jnp.asarray(DESIGNATED_TOKENS)[whole(scalars[:, 0], len(DESIGNATED_TOKENS))]
    query = jnp.where(scalars[:, 1] < p, designated, whole(scalars[:, 2], vocab_size))

    if literal_bernoulli:
        is_query = draw < B / num_pairs
    else:
        certain = whole(scalars[:, 3:], num_pairs) == slot
        is_query = certain | (draw < (B - 1.0) / jnp.maximum(num_pairs - 1, 1))
    used = slot < num_pairs
    is_query = is_query & used  # [b, slots]

    others = shuffled(noise_other, (token < vocab_size) & (token != query[:, None]))
    rank = jnp.cumsum(~is_query, axis=1) - 1  # place of a slot among those without the query
    other_keys = jnp.take_along_axis(others, jnp.clip(rank, 0, vocab - 1), axis=1)
    keys = jnp.where(is_query, query[:, None], other_keys)  # [b, slots]
    values = jnp.take_along_axis(mapping, keys, axis=1)
    pairs = jnp.where(used[:, None], jnp.stack([keys, values], axis=-1), 0)  # [b, slots, 2]
    tokens = jnp.pad(pairs.reshape(batch_size, 2 * slots), ((0, 0), (0, 1)))
    query_position = jnp.asarray(2 * num_pairs, jnp.int32)
    tokens = jnp.where(jnp.arange(2 * slots + 1) == query_position, query[:, None], tokens)
    target = jnp.take_along_axis(mapping, query[:, None], axis=1)[:, 0]
    return RecallBatch(tokens.astype(jnp.int32), target.astype(jnp.int32), is_query, query_position)


def query_probabilities(vocab_size: int, p: float) -> jax.Array:
    """Distribution of the query: ``p/2 + (1−p)/V`` on the designated tokens, else ``(1−p)/V``.

    Args:
        vocab_size: Tokens V, at least 2.
        p: Cross-sample repetition, in [0, 1].

    Returns:
        ``[V]`` float32 summing to 1.

    >>> query_probabilities(4, 0.5).tolist()
    [0.375, 0.375, 0.125, 0.125]
    """
    _check_static("vocab_size", vocab_size, 2, float("inf"))
    _check_static("p", p, 0.0, 1.0)
    base = jnp.full((vocab_size,), (1.0 - p) / vocab_size)
    return base.at[jnp.asarray(DESIGNATED_TOKENS)].add(p / len(DESIGNATED_TOKENS))

"""Continue texts with a (compressed) cache: prefill and decode, each compiled once.

A generation is ``prefill -> [context passes -> eviction] -> decode``. The prefill is one compiled
function, with R-KV's first cut inside; the decode is one compiled loop, with every later cut
inside. Caches are donated to the loop, so they exist once. :func:`prepare` stops after the
eviction, and :func:`answer` asks what it made, as often as one likes.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.compress import Compressor, ContextPass, parse
from jaxeff.kv_cache import DenseCache, KVCache, store_name
from jaxeff.kv_cache.flight import read_in_order, was_read
from jaxeff.nn.rope import rope_frequencies
from jaxeff.quant import use_fp8

__all__ = [
    "Context",
    "ContinuationScore",
    "Generation",
    "answer",
    "generate",
    "prepare",
    "sample",
    "score_continuation",
]


_COLDEST = 1e-30  # logits over less than that are infinite


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns.

    Args:
        tokens: int32 ``[B, max_new_tokens]``; after a stop token, copies of the first stop token.
        lengths: int32 ``[B]``, tokens generated per row, a stop token included.
        cache: the cache after the last step.
        prefill_seconds: time of the prefill, without compilation.
        compress_seconds: time of context passes and eviction; 0 for methods without.
        decode_seconds: time of the decode loop, without compilation.
        tokens_per_second: tokens that the loop produced, over all rows, per second.

    Examples:
        >>> [field.name for field in dataclasses.fields(Generation)][:2]
        ['tokens', 'lengths']

    References:
        R-KV (arXiv 2505.24133), section 4.4 (throughput is counted over the batch).
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: KVCache
    prefill_seconds: float
    compress_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """What :func:`score_continuation` returns.

    Args:
        loss: mean negative log-likelihood, in nats per token.
        logprobs: f32 ``[B, M]``, log-probability of every true token, in nats.
        tokens: int32 ``[B, M]``, the most likely token at every place.
        cache: the cache after the last step.
        prefill_seconds, compress_seconds, decode_seconds: times without compilation.
        tokens_per_second: decoded tokens over all rows, per second.

    Examples:
        >>> [field.name for field in dataclasses.fields(ContinuationScore)][:3]
        ['loss', 'logprobs', 'tokens']

    References:
        KVzip (arXiv 2505.23416), section 4.1 (one compressed cache, later queries).
    """

    loss: float
    logprobs: jax.Array
    tokens: jax.Array
    cache: KVCache
    prefill_seconds: float
    compress_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """Static facts of a generation loop."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop_tokens: tuple[int, ...]


def generate(
    model: Any,
    tokens: Any,
    *,
    lengths: Any = None,
    max_new_tokens: int | Sequence[int],
    compression: str | Compressor | None = None,
    cache_dtype: Any = None,
    prefill_chunk: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: Callable[[np.ndarray, int], Any] | None = None,
    stream_every: int = 1,
) -> Generation:
    """Continue a batch of prompts.

    Prefill and decode are two compiled functions, each compiled once for all steps and kept for
    later calls of the same shapes. The last generated token is returned but not fed back, so the
    cache has seen ``lengths + max_new_tokens - 1`` tokens.

    Args:
        model: an NNX module called as ``model(tokens, valid=…, cache=…) -> (logits, cache)``, with
            ``model.config``.
        tokens: int ``[B, T]``, prompts, padded on the right. If they are sharded over rows (and the
            model's projections over heads), so is the cache.
        lengths: int ``[B]``, prompt lengths in tokens, from 1 to ``T``; ``None``: all ``T``.
        max_new_tokens: tokens to generate, 1 or more; one number, or one per row.
        compression: ``None`` or ``"full"``, a text such as ``"rkv:256"`` or ``"kvzip:0.3"``, or a
            compressor.
        cache_dtype: storage of the cache (see ``DenseCache.init``), unless the compressor names
            one; ``None``: the model's dtype.
        prefill_chunk: prompt tokens per forward, which bounds the memory of a long prefill;
            ``None``: all at once.
        temperature: 0 takes the most likely token; above 0 divides the logits.
        top_k: sample among this many most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities reach this, in (0, 1].
        min_p: sample among tokens at least this many times as likely as the likeliest, in (0, 1].
        key: ``jax.random.key``; needed if ``temperature > 0``.
        stop_tokens: token ids that end a row.
        on_tokens: called on the host as ``on_tokens(tokens, step)`` with the new tokens
            ``[B, n]`` from step ``step`` on; returning True ends all rows (stop strings).
        stream_every: steps between two such calls; the loop is compiled once either way.

    Returns:
        :class:`Generation`.

    Raises:
        ValueError: if an argument is out of range or a compression is not known.

    Examples:
        >>> from jaxeff.models import Decoder, ModelConfig
        >>> config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=8, num_heads=2)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> result = generate(model, [[1, 2, 3]], max_new_tokens=4, compression="rkv:8")
        >>> result.tokens.shape, result.lengths.tolist(), result.cache.seen.tolist()
        ((1, 4), [4], [6])

    References:
        R-KV (arXiv 2505.24133), section 3.1; KVzip (arXiv 2505.23416), section 3.2; top-p:
        arXiv 1904.09751, section 3.1.
    """
    sharding = getattr(tokens, "sharding", None)
    tokens, lengths = _check_prompt(model, tokens, lengths)
    sampling = _check_sampling(model, temperature, top_k, top_p, min_p, key, stop_tokens)
    limits = _check_limits(max_new_tokens, tokens.shape[0])
    _check_stream(on_tokens, stream_every)
    room = int(limits.max()) - 1
    prepared = _prepare(
        model, tokens, lengths, room, compression, cache_dtype, prefill_chunk, sharding
    )
    return _generate(prepared, sampling, limits, key, on_tokens, stream_every)


def _generate(prepared, sampling, limits, key, on_tokens, stream_every) -> Generation:
    """Decode on a prepared cache, in one call of the compiled loop or in several."""
    key = jax.random.key(0) if key is None else key
    steps = int(limits.max())
    static = (prepared.graphdef, prepared.compressor, sampling, steps)
    limits = jnp.asarray(limits)
    carry, seconds = _run(_first, static[2:], prepared.logits, key, limits)
    cache, until, sent = prepared.cache, steps, 0
    while True:
        if on_tokens is not None:
            done = int(carry[0])
            fresh = np.asarray(carry[3][:, sent:done])
            if fresh.size and on_tokens(fresh, sent):
                carry = (*carry[:2], jnp.ones_like(carry[2]), *carry[3:])
            sent, until = done, min(done + stream_every, steps)
        if int(carry[0]) >= steps or bool(np.all(np.asarray(carry[2]))):
            break
        (carry, cache), more = _run(
            _decode, static, prepared.state, cache, carry, limits, key, jnp.int32(until)
        )
        seconds += more
    _check_overflow(cache)
    _, _, _, tokens, counts = carry
    return Generation(
        tokens=tokens,
        lengths=counts,
        cache=cache,
        prefill_seconds=prepared.prefill_seconds,
        compress_seconds=prepared.compress_seconds,
        decode_seconds=seconds,
        tokens_per_second=int(jnp.sum(counts - 1)) / seconds,
    )


@dataclasses.dataclass(frozen=True)
class Context:
    """A text in its compressed cache, made by :func:`prepare`, asked with :func:`answer`.

    Args:
        model: the model that read it.
        compressor: the method that cut it.
        cache: its cache, with no room to spare; :func:`answer` works on a copy with room.
        prefill_seconds: time of the prefill, without compilation.
        compress_seconds: time of context passes and eviction.

    Examples:
        >>> [field.name for field in dataclasses.fields(Context)][:3]
        ['model', 'compressor', 'cache']

    References:
        KVzip (arXiv 2505.23416), section 3.1 (one compressed cache serves all queries).
    """

    model: Any
    compressor: Compressor
    cache: KVCache
    prefill_seconds: float
    compress_seconds: float


def prepare(
    model: Any,
    tokens: Any,
    *,
    lengths: Any = None,
    compression: str | Compressor | None = None,
    cache_dtype: Any = None,
    prefill_chunk: int | None = None,
) -> Context:
    """Read a batch of contexts once and compress their caches, to be asked many times.

    Args:
        model: as in :func:`generate`.
        tokens: int ``[B, T]``, contexts, padded on the right.
        lengths: int ``[B]``, their lengths in tokens; ``None``: all ``T``.
        compression, cache_dtype, prefill_chunk: as in :func:`generate`.

    Returns:
        :class:`Context`. Its cache holds what the method keeps and no more; a method that holds a
        budget while decoding (R-KV) has its buffer too.

    Raises:
        ValueError: if an argument is out of range or a compression is not known.

    Examples:
        >>> from jaxeff.models import Decoder, ModelConfig
        >>> config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=8, num_heads=2)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> context = prepare(model, [[1, 2, 3, 4]], compression="streaming_llm:5")
        >>> answer(context, [[5, 6]], max_new_tokens=2).tokens.shape
        (1, 2)

    References:
        KVzip (arXiv 2505.23416), sections 3.1 and 3.2.
    """
    sharding = getattr(tokens, "sharding", None)
    tokens, lengths = _check_prompt(model, tokens, lengths)
    made = _prepare(model, tokens, lengths, None, compression, cache_dtype, prefill_chunk, sharding)
    _check_overflow(made.cache)
    return Context(model, made.compressor, made.cache, made.prefill_seconds, made.compress_seconds)


def answer(
    context: Context,
    question: Any,
    *,
    lengths: Any = None,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: Callable[[np.ndarray, int], Any] | None = None,
    stream_every: int = 1,
) -> Generation:
    """Answer questions about a prepared context, which stays as it is.

    Args:
        context: from :func:`prepare`; its buffers are never donated.
        question: int ``[B, T]``, one per row of the context, padded on the right.
        lengths: int ``[B]``, their lengths in tokens; ``None``: all ``T``.
        max_new_tokens, temperature, top_k, top_p, min_p, key, stop_tokens, on_tokens,
            stream_every: as in :func:`generate`.

    Returns:
        :class:`Generation`. For another turn after this one, put its cache into the context:
        ``dataclasses.replace(context, cache=result.cache)``; the last generated token was not fed
        and belongs to the front of the next question.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> [name for name in ("prepare", "answer") if name in __all__]
        ['prepare', 'answer']

    References:
        KVzip (arXiv 2505.23416), section 3.1.
    """
    model, sharding = context.model, getattr(question, "sharding", None)
    question, lengths = _check_prompt(model, question, lengths, name="question")
    sampling = _check_sampling(model, temperature, top_k, top_p, min_p, key, stop_tokens)
    limits = _check_limits(max_new_tokens, question.shape[0])
    _check_stream(on_tokens, stream_every)
    batch = context.cache.seen.shape[0]
    if question.shape[0] != batch:
        raise ValueError(f"question has {question.shape[0]} rows; the context has {batch}")
    graphdef, state = nnx.split(model)
    (logits, cache), seconds = _run(
        _turn,
        (graphdef, context.compressor, int(limits.max()) - 1),
        state,
        context.cache,
        _place(question, sharding),
        jnp.asarray(lengths),
    )
    prepared = _Prepared(graphdef, state, context.compressor, cache, logits, seconds, 0.0)
    return _generate(prepared, sampling, limits, key, on_tokens, stream_every)


def score_continuation(
    model: Any,
    prompt: Any,
    continuation: Any,
    *,
    lengths: Any = None,
    compression: str | Compressor | None = None,
    cache_dtype: Any = None,
    prefill_chunk: int | None = None,
) -> ContinuationScore:
    """Score true continuations token by token, through the cache that a generation would use.

    ``loss = -mean log p(continuation[i] | prompt, continuation[:i])``: teacher-forced decoding,
    one token per step, so that a decode-time method compacts exactly as it would when generating.

    Args:
        model: as in :func:`generate`.
        prompt: int ``[B, T]``, padded on the right.
        continuation: int ``[B, M]``, the tokens that truly follow each prompt.
        lengths: int ``[B]``, prompt lengths in tokens; ``None``: all ``T``.
        compression, cache_dtype, prefill_chunk: as in :func:`generate`.

    Returns:
        :class:`ContinuationScore`.

    Raises:
        ValueError: if an argument is out of range or a compression is not known.

    Examples:
        >>> from jaxeff.models import Decoder, ModelConfig
        >>> config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=8, num_heads=2)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> score_continuation(model, [[1, 2, 3]], [[4, 5]]).logprobs.shape
        (1, 2)

    References:
        KVzip (arXiv 2505.23416), section 4.1.
    """
    sharding = getattr(prompt, "sharding", None)
    prompt, lengths = _check_prompt(model, prompt, lengths)
    continuation, _ = _check_prompt(model, continuation, None, name="continuation")
    if continuation.shape[0] != prompt.shape[0]:
        raise ValueError(
            f"continuation has {continuation.shape[0]} rows; prompt has {prompt.shape[0]}"
        )
    steps = continuation.shape[1] - 1
    prepared = _prepare(
        model, prompt, lengths, steps, compression, cache_dtype, prefill_chunk, sharding
    )
    (logprobs, best, cache), seconds = _run(
        _force,
        (prepared.graphdef, prepared.compressor),
        prepared.state,
        prepared.cache,
        prepared.logits,
        jnp.asarray(continuation),
    )
    _check_overflow(cache)
    return ContinuationScore(
        loss=float(-jnp.mean(logprobs)),
        logprobs=logprobs,
        tokens=best,
        cache=cache,
        prefill_seconds=prepared.prefill_seconds,
        compress_seconds=prepared.compress_seconds,
        decode_seconds=seconds,
        tokens_per_second=prompt.shape[0] * steps / seconds,
    )


def sample(
    logits: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> jax.Array:
    """Draw one token per row.

    Args:
        logits: float ``[B, V]``.
        key: ``jax.random.key``; needed if ``temperature > 0``.
        temperature: 0 takes the largest logit; above 0 divides the logits.
        top_k: keep this many largest logits; ties with the last of them stay.
        top_p: of what is left, keep the fewest tokens whose probabilities sum to this or more.
        min_p: of what is left, keep tokens at least this many times as likely as the likeliest.

    Returns:
        int32 ``[B]``.

    Raises:
        ValueError: if ``temperature > 0`` and there is no key, or a setting is out of range.

    Examples:
        >>> sample(jnp.array([[0.0, 2.0, 1.0]])).tolist()
        [1]
        >>> sample(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0), temperature=1, top_k=1).tolist()
        [1]

    References:
        Holtzman et al., arXiv 1904.09751, section 3.1 (nucleus sampling); Nguyen et al., arXiv
        2407.01082, section 3 (min-p).
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"key is None; temperature={temperature} needs a jax.random.key")
    _check_shares(logits.shape[-1], temperature, top_k, top_p, min_p)
    logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        mass = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p: the first one always stays.
        kept = jnp.cumsum(mass, axis=-1) - mass < top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits - top < jnp.log(min_p), -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A prompt in its cache, ready to decode."""

    graphdef: Any
    state: Any
    compressor: Compressor
    cache: KVCache
    logits: jax.Array  # [B, V], of each row's last prompt token
    prefill_seconds: float
    compress_seconds: float


def _prepare(
    model, tokens, lengths, room, compression, cache_dtype, prefill_chunk=None, sharding=None
) -> _Prepared:
    """Prefill, and let the compressor cut the context; ``room=None``: nothing will follow yet."""
    prompt = tokens.shape[1]
    compressor = parse(compression).bind(**_facts(model.config))
    if room is not None:
        compressor = compressor.fit(prompt=prompt, room=room)
    store = compressor.storage or cache_dtype
    store = getattr(model, "dtype", jnp.bfloat16) if store is None else store
    store = store_name(store)
    if prefill_chunk is not None and (not isinstance(prefill_chunk, int) or prefill_chunk < 1):
        raise ValueError(f"prefill_chunk={prefill_chunk!r}; expected a whole number, 1 or more")
    capacity = compressor.prefill_capacity(prompt=prompt, room=room or 0)
    if capacity < prompt:
        raise ValueError(
            f"{compressor.name} prefills a cache of {capacity} slots; "
            f"the prompt has {prompt} tokens"
        )
    graphdef, state = nnx.split(model)
    if prefill_chunk is not None and prefill_chunk >= prompt:
        prefill_chunk = None
    # A ring of a window that the text cannot fill needs no slots beyond the text.
    limit = None if room is None else prompt + room
    (logits, cache), prefill_seconds = _run(
        _prefill,
        (graphdef, compressor, capacity, store, prefill_chunk, limit),
        state,
        _place(tokens, sharding),
        jnp.asarray(lengths),
    )
    passes = compressor.context_passes(tokens, lengths, vocab_size=model.config.vocab_size)
    scores, compress_seconds = (), 0.0
    # A forward takes about as many tokens, and so as much memory, as the prefill did.
    many = side_by_side(passes, compressor.most_passes(cache), prefill_chunk or prompt)
    for item in many:
        found, seconds = _run(
            _observe,
            (graphdef, compressor),
            state,
            cache,
            _place(item.tokens, sharding),
            _place(item.valid, sharding),
            jnp.asarray(item.start, jnp.int32),
        )
        scores = tuple(map(jnp.maximum, scores, found)) if scores else found
        compress_seconds += seconds
    if passes or compressor.evicts_context:
        begin = time.perf_counter()
        cache = compressor.evict_context(cache, scores, room=room or 0)
        jax.block_until_ready(cache)
        compress_seconds += time.perf_counter() - begin
    return _Prepared(graphdef, state, compressor, cache, logits, prefill_seconds, compress_seconds)


def _place(x: np.ndarray, sharding: Any) -> jax.Array:
    """Return an array ``[B, T]`` laid out as the user laid out the tokens."""
    if sharding is None or len(sharding.device_set) == 1:
        return jnp.asarray(x)
    return jax.device_put(x, sharding)


def _facts(config: Any) -> dict[str, Any]:
    """Return what compressors may want to know of a model."""
    rope = getattr(config, "rope", None)
    frequencies = None
    if rope is not None:
        frequencies = tuple(rope_frequencies(config.head_dim, rope).tolist())
    return {"scale": getattr(config, "query_scale", None), "frequencies": frequencies}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _prefill(graphdef, compressor, capacity, store, chunk, limit, state, tokens, lengths):
    """Run the prompts through a fresh cache; return the last logits and the cache to decode on."""
    model = nnx.merge(graphdef, state)
    windows = getattr(model.config, "layer_windows", ()) or (None,) * model.config.num_layers
    cache = DenseCache.init_for(
        model,
        tokens.shape[0],
        [capacity if w is None else limit or w for w in windows],
        dtype=store,
        query_window=compressor.query_window,
        observer=compressor.observer,
    )
    logits, cache = _read_text(graphdef, state, read_in_order(cache), tokens, lengths, chunk)
    return logits, compressor.after_prefill(was_read(cache))


def _read_text(graphdef, state, cache, tokens, lengths, chunk=None):
    """Feed ``tokens [B, T]``, some at a time; return the logits after each row's last token."""
    batch, steps = tokens.shape
    chunk = steps if chunk is None else chunk
    pad = -steps % chunk
    valid = jnp.arange(steps + pad) < lengths[:, None]
    tokens = jnp.pad(tokens, ((0, 0), (0, pad)))

    def split(x):
        return jnp.moveaxis(x.reshape(batch, -1, chunk), 1, 0)

    def one_chunk(carry, item):
        cache, logits = carry
        part, real, start = item
        last = lengths - 1 - start
        found, cache = _last_logits(graphdef, state, cache, part, real, last)
        here = (last >= 0) & (last < chunk)
        return (cache, jnp.where(here[:, None], found, logits)), None

    if chunk == steps:
        return _last_logits(graphdef, state, cache, tokens, valid, lengths - 1)
    vocab = nnx.merge(graphdef, state).config.vocab_size
    items = (split(tokens), split(valid), jnp.arange(0, steps + pad, chunk))
    start = (cache, jnp.zeros((batch, vocab), jnp.float32))
    (cache, logits), _ = jax.lax.scan(one_chunk, start, items)
    return logits, cache


def _last_logits(graphdef, state, cache, tokens, valid, last):
    """Run the model over ``tokens``; return f32 logits ``[B, V]`` at ``last`` (clipped), cache."""
    model = nnx.merge(graphdef, state)
    rows, last = jnp.arange(tokens.shape[0]), jnp.clip(last, 0, tokens.shape[1] - 1)
    if hasattr(model, "logits"):
        # The vocabulary is wide: only the last token's logits are worth computing. The logits of
        # all tokens are never used here, and the compiler drops them.
        _, cache, hidden = model(tokens, valid=valid, cache=cache, return_hidden=True)
        logits = model.logits(hidden[-1][rows, last][:, None])[:, 0]
    else:
        logits, cache = model(tokens, valid=valid, cache=cache)
        logits = logits[rows, last]
    return logits.astype(jnp.float32), cache


@partial(jax.jit, static_argnums=(0, 1, 2))
def _turn(graphdef, compressor, room, state, cache, tokens, lengths):
    """Feed a question to a copy of a compressed cache that has room for it and the answer."""
    count = tokens.shape[1]
    cache = compressor.before_turn(cache, tokens=count, room=room)
    logits, cache = _read_text(graphdef, state, cache, tokens, lengths)
    return logits, compressor.after_turn(cache, tokens=count)


def side_by_side(passes: list[ContextPass], most: int, tokens: int) -> list[ContextPass]:
    """Join context passes, so that a forward takes at most ``most`` of them and about ``tokens``.

    Args:
        passes: all of one shape ``[B, A]``.
        most: of a forward; 1 leaves them as they are.
        tokens: of a forward, to the nearest pass; one at least.

    Returns:
        Passes of one shape ``[B, P * A]`` with starts ``[P]``; empty ones fill the last up.

    Examples:
        >>> one = ContextPass(np.zeros((1, 4), np.int32), np.ones((1, 4), bool), 0)
        >>> [item.tokens.shape for item in side_by_side([one] * 5, 100, 11)]
        [(1, 12), (1, 12)]
        >>> side_by_side([one], 1, 11)[0].start
        0

    References:
        KVzip (arXiv 2505.23416), section 3.4 (chunks bound the memory of the scoring).
    """
    if not passes or most < 2:
        return passes
    count = max(1, min(most, len(passes), round(tokens / passes[0].tokens.shape[1])))
    count = -(-len(passes) // -(-len(passes) // count))  # as even as can be
    joined = []
    for begin in range(0, len(passes), count):
        part = passes[begin : begin + count]
        empty = part[-1]._replace(valid=np.zeros_like(part[-1].valid))
        part = [*part, *[empty] * (count - len(part))]
        rows, valid = (np.concatenate(x, axis=1) for x in list(zip(*part, strict=True))[:2])
        joined.append(ContextPass(rows, valid, np.asarray([x.start for x in part], np.int32)))
    return joined


@partial(jax.jit, static_argnums=(0, 1))
def _observe(graphdef, compressor, state, cache, tokens, valid, start):
    """Run context passes; return the scores that they recorded. The cache stays as it is."""
    model = nnx.merge(graphdef, state)
    if compressor.pass_format is not None:
        use_fp8(model)
    where = {}
    if start.ndim:  # every pass counts on from the context
        steps = jnp.cumsum(valid.reshape(valid.shape[0], start.shape[0], -1), axis=-1) - 1
        steps = jnp.maximum(steps, 0).reshape(valid.shape)
        where["positions"] = cache.seen[:, None] + steps.astype(jnp.int32)
    _, seen = model(tokens, valid=valid, cache=compressor.observe(cache, start), **where)
    return compressor.collect(seen)


@partial(jax.jit, static_argnums=(0, 1))
def _first(sampling, steps, logits, key, limits):
    """Draw the first token; return what the loop carries: step, token, done, tokens, lengths."""
    stop = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)
    first = _draw(sampling, logits, jax.random.fold_in(key, 0))
    tokens = jnp.broadcast_to(stop[0], (first.size, steps)).at[:, 0].set(first)
    done = jnp.isin(first, stop) | (limits <= 1)
    return jnp.int32(1), first, done, tokens, jnp.ones(first.size, jnp.int32)


def _draw(sampling, logits, key):
    return sample(
        logits,
        key,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6))
def _decode(graphdef, compressor, sampling, steps, state, cache, carry, limits, key, until):
    """Generate up to step ``until``; stop early once every row has stopped.

    Two loops, where the compressor says when it is due: the inner one only appends to the cache,
    which XLA does in place. A branch in every step would make it copy the cache.
    """
    stop = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)
    tells = compressor.due(cache) is not None

    def unfinished(carry):
        (step, _, done, _, _), _ = carry
        return (step < until) & ~jnp.all(done)

    def one_step(carry):
        (step, token, done, tokens, lengths), cache = carry
        out, cache = _append(graphdef, state, cache, token, ~done)
        token = _draw(sampling, out, jax.random.fold_in(key, step))
        token = jnp.where(done, stop[0], token)
        tokens = tokens.at[:, step].set(token)
        lengths = lengths + ~done
        done = done | jnp.isin(token, stop) | (lengths >= limits)
        return (step + 1, token, done, tokens, lengths), cache

    def until_due(carry):
        begun = carry[0][0]

        def goes_on(carry):
            return unfinished(carry) & ((carry[0][0] == begun) | ~compressor.due(carry[1]))

        return jax.lax.while_loop(goes_on, one_step, carry) if tells else one_step(carry)

    def segment(carry):
        carry, cache = until_due(carry)
        return carry, compressor.after_step(cache)

    return jax.lax.while_loop(unfinished, segment, (carry, cache))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _force(graphdef, compressor, state, cache, logits, continuation):
    """Feed the true tokens one by one; return their log-probabilities and the likeliest ones."""
    every = jnp.ones(continuation.shape[0], bool)

    def one_step(carry, token):
        cache, logits = carry
        seen = _token_score(logits, token)
        logits, cache = _step(graphdef, state, compressor, cache, token, every)
        return (cache, logits), seen

    (cache, logits), seen = jax.lax.scan(one_step, (cache, logits), continuation[:, :-1].T)
    last = _token_score(logits, continuation[:, -1])
    joined = [jnp.concatenate([a, b[None]]).T for a, b in zip(seen, last, strict=True)]
    return *joined, cache


def _token_score(logits, token):
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None].astype(jnp.int32), axis=-1)[:, 0]
    return chosen, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _step(graphdef, state, compressor, cache, token, active):
    """Feed one token per row; return f32 logits ``[B, V]`` and the cache, compacted if due."""
    logits, cache = _append(graphdef, state, cache, token, active)
    return logits, compressor.after_step(cache)


def _append(graphdef, state, cache, token, active):
    """Feed one token per row; return f32 logits ``[B, V]`` and the cache."""
    model = nnx.merge(graphdef, state)
    logits, cache = model(token[:, None], valid=active[:, None], cache=cache)
    return logits[:, 0].astype(jnp.float32), cache


_EXECUTABLES: OrderedDict[Any, Any] = OrderedDict()
_MAX_EXECUTABLES = 64


def _run(function: Any, static: tuple, *args: Any) -> tuple[Any, float]:
    """Call a jitted function, compiling it before the clock starts; return result and seconds.

    ``jax.jit`` would compile inside the first call, and its time would count as prefill or decode.
    So executables are kept here, by static arguments, shapes, shardings and trace settings.
    """
    leaves, structure = jax.tree.flatten(args)
    avals = tuple((jnp.shape(x), jnp.result_type(x), getattr(x, "sharding", None)) for x in leaves)
    settings = (
        jax.config.jax_default_matmul_precision,
        jax.config.jax_enable_x64,
        jax.config.jax_debug_nans,
        jax.sharding.get_abstract_mesh(),
    )
    identity = (function, static, structure, avals, settings)
    executable = _EXECUTABLES.get(identity)
    if executable is None:
        executable = function.lower(*static, *args).compile()
        _EXECUTABLES[identity] = executable
        if len(_EXECUTABLES) > _MAX_EXECUTABLES:
            _EXECUTABLES.popitem(last=False)
    jax.block_until_ready(args)
    begin = time.perf_counter()
    result = jax.block_until_ready(executable(*args))
    return result, time.perf_counter() - begin


def _check_prompt(model, tokens, lengths, name="tokens") -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and lengths as int32 arrays of the host, or say what is wrong with them."""
    try:
        tokens = np.asarray(tokens)
    except ValueError as error:
        raise ValueError(
            f"{name} has rows of unequal length; pad them on the right and give lengths="
        ) from error
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ValueError(
            f"{name} has shape {tokens.shape} and dtype {tokens.dtype}; "
            "expected integers [B, T] with at least one token"
        )
    vocabulary = model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"{name} has ids from {tokens.min()} to {tokens.max()}; "
            f"the vocabulary has {vocabulary} tokens"
        )
    batch, steps = tokens.shape
    lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; "
            f"expected integers [{batch}]"
        )
    if lengths.min() < 1 or lengths.max() > steps:
        raise ValueError(
            f"lengths has values from {lengths.min()} to {lengths.max()}; expected 1 to {steps}"
        )
    return tokens.astype(np.int32), lengths.astype(np.int32)


def _check_sampling(model, temperature, top_k, top_p, min_p, key, stop_tokens) -> _Sampling:
    """Return the sampling settings, or say which one is out of range."""
    vocabulary = model.config.vocab_size
    _check_shares(vocabulary, temperature, top_k, top_p, min_p)
    if temperature > 0 and key is None:
        raise ValueError(f"key is None; temperature={temperature} needs a jax.random.key")
    if temperature == 0 and (top_k, top_p, min_p) != (None, None, None):
        raise ValueError("top_k, top_p and min_p need temperature > 0; temperature=0 is greedy")
    if not isinstance(stop_tokens, Iterable):
        raise ValueError(f"stop_tokens={stop_tokens!r}; expected a sequence of token ids")
    stop = tuple(int(token) for token in stop_tokens)
    for token in stop:
        if not 0 <= token < vocabulary:
            raise ValueError(f"stop_tokens has {token}; the vocabulary has {vocabulary} tokens")
    return _Sampling(float(temperature), top_k, top_p, min_p, stop)


def _check_shares(vocabulary: int, temperature, top_k, top_p, min_p) -> None:
    """Say which number is out of range; a traced one is taken as it is."""
    known = lambda x: x is not None and not isinstance(x, jax.core.Tracer)  # noqa: E731
    if known(temperature) and not (temperature == 0 or temperature >= _COLDEST):
        raise ValueError(f"temperature={temperature}; expected 0 (greedy), or {_COLDEST} and more")
    if top_k is not None:
        whole = isinstance(top_k, int | np.integer) and not isinstance(top_k, bool)
        if not whole or not 1 <= top_k <= vocabulary:
            raise ValueError(f"top_k={top_k}; expected 1 to {vocabulary}, the vocabulary")
    if known(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a probability in (0, 1]")
    if known(min_p) and not 0 < min_p <= 1:
        raise ValueError(f"min_p={min_p}; expected a share of the largest probability in (0, 1]")


def _check_limits(max_new_tokens, batch: int) -> np.ndarray:
    """Return the tokens that each row may generate, int32 ``[B]``."""
    limits = np.asarray(max_new_tokens)
    if not np.issubdtype(limits.dtype, np.integer) or limits.shape not in ((), (batch,)):
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r}; expected a whole number, 1 or more, or {batch} of "
            "them, one per row"
        )
    if limits.min() < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}; expected a whole number, 1 or more")
    return np.broadcast_to(limits, (batch,)).astype(np.int32)


def _check_stream(on_tokens, stream_every: int) -> None:
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(f"on_tokens is a {type(on_tokens).__name__}; expected a callable or None")
    if isinstance(stream_every, bool) or not isinstance(stream_every, int) or stream_every < 1:
        raise ValueError(f"stream_every={stream_every!r}; expected a whole number, 1 or more")


def _check_overflow(cache: KVCache) -> None:
    lost = np.flatnonzero(np.asarray(cache.overflow))
    if lost.size:
        raise ValueError(
            f"the cache overflowed in rows {lost.tolist()}: the compressor allocated fewer slots "
            "than it let grow"
        )

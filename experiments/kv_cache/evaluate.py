"""Accuracy and bytes of one method at one budget: recall (E1, E2) and traces (E3, E4)."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.kv_cache.tasks import ANS, DONE, REPEAT, Recall, Trace
from jaxeff.generate import answer, generate, prepare

ROOM = 16  # slots that a method holding a budget gets beyond it, enough for question and answer

# E1: what each method is called with, at a budget of `b` entries or a ratio `r`. All keep the
# system prompt. KVzip asks for the repetition as the model was trained to give it.
_REPEAT = f"repeat_prompt=[{REPEAT}], repeat_prompt_later=[{REPEAT}], header=[{ANS}], num_sinks=2"
RECALL_METHODS = {
    "kvzip_pair": f"kvzip(ratio={{r}}, {_REPEAT}, layout='tiled', bucket=4)",
    "kvzip_uniform": f"kvzip(ratio={{r}}, {_REPEAT}, level='uniform', bucket=4)",
    "kvzip_head": f"kvzip(ratio={{r}}, {_REPEAT}, level='head', layout='tiled', bucket=4)",
    "kvzip_plus": f"kvzip(ratio={{r}}, {_REPEAT}, kvzip_plus=True, layout='tiled', bucket=4)",
    "kvzip_pair_int8": f"kvzip(ratio={{r}}, {_REPEAT}, layout='tiled', bucket=4, storage='int8')",
    "kvzip_pair_fp8": f"kvzip(ratio={{r}}, {_REPEAT}, layout='tiled', bucket=4, pass_format='fp8')",
    "snap_agnostic": "snapkv(budget={b}, window={w}, variant='kvzip', num_sinks=2, buffer={room})",
    "snap_reuse": "snapkv(budget={b}, window=3, variant='kvzip', num_sinks=2, buffer={room})",
    "snap_oracle": "snapkv(budget={b}, window=3, variant='kvzip', num_sinks=2, buffer={room})",
    "h2o_max": "h2o(budget={b}, window={w}, statistic='max', num_sinks=2, buffer={room})",
    "tova": "tova(budget={b}, num_sinks=2, buffer={room})",
    "keydiff": "keydiff(budget={b}, num_sinks=2, buffer={room})",
    "knorm": "knorm(budget={b}, num_sinks=2, buffer={room})",
    "expected_attention": "expected_attention(budget={b}, num_sinks=2, future=64, buffer={room})",
    "streaming_llm": "streaming_llm(budget={b}, num_sinks=2, buffer={room})",
    "random": "random(budget={b}, num_sinks=2, buffer={room})",
}

# E3: methods that hold a budget while they decode; eight observation queries, as in the paper.
# All keep the prompt, which is not part of the budget.
TRACE_METHODS = {
    "rkv": "rkv(budget={b}, buffer={buffer}, num_sinks={s}, window={w})",
    "snapkv": "snapkv(budget={b}, buffer={buffer}, num_sinks={s}, window={w})",
    "h2o": "h2o(budget={b}, buffer={buffer}, num_sinks={s})",
    "tova": "tova(budget={b}, buffer={buffer}, num_sinks={s})",
    "keydiff": "keydiff(budget={b}, buffer={buffer}, num_sinks={s}, window={w})",
    "expected_attention": "expected_attention(budget={b}, buffer={buffer}, num_sinks={s}, "
    "window={w})",
    "streaming_llm": "streaming_llm(budget={b}, buffer={buffer}, num_sinks={s})",
    "random": "random(budget={b}, buffer={buffer}, num_sinks={s}, window={w})",
}


def interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share.

    Args:
        hits: successes.
        count: trials, 1 or more.
    """
    share, z = hits / count, 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return middle - half, middle + half


def _cell(hits: np.ndarray, full_bytes: int, cache: Any, **more: Any) -> dict[str, Any]:
    """Return the record of a cell; ``hits`` is bool, any shape."""
    low, high = interval(int(hits.sum()), hits.size)
    return {
        "accuracy": round(float(hits.mean()), 4),
        "interval": [round(low, 4), round(high, 4)],
        "count": int(hits.size),
        "allocated_bytes": cache.allocated_bytes(),
        "bytes_over_full": round(cache.allocated_bytes() / full_bytes, 4),
        "kept_ratio": round(float(cache.kept_ratio().mean()), 4),
        **more,
    }


def recall_cell(
    task: Recall,
    model: Any,
    method: str,
    ratio: float,
    *,
    rows: int,
    seed: int,
    questions: int | None = None,
) -> dict[str, Any]:
    """Compress ``rows`` contexts once and ask about the pairs of each, from the same cache.

    ``snap_reuse`` sees the first question while compressing and answers the others;
    ``snap_oracle`` compresses anew for every question.

    Args:
        task: the task the model was trained on.
        model: the decoder.
        method: a key of ``RECALL_METHODS``, or ``"full"``.
        ratio: share of the context kept (the system prompt is kept beside it).
        rows: contexts.
        seed: seed of the contexts.
        questions: how many pairs (in random order) are asked for; ``None``: all.

    Returns:
        Accuracy of whole answers, its interval, and bytes of the compressed context.
    """
    context, keys, values = task.contexts(np.random.default_rng(seed), rows)
    keys, values = keys[:, :questions], values[:, :questions]
    questions = task.questions(keys)  # [B, N, 3 or 4]
    full = _full_bytes(model, rows, context.shape[1])
    size = task.num_sinks + round(ratio * (context.shape[1] - task.num_sinks))
    text = "full"
    if method != "full":
        window = max(1, min(16, (size - 2) // 2))
        text = RECALL_METHODS[method].format(r=ratio, b=size, w=window, room=ROOM)
    asked = range(questions.shape[1])
    if method == "snap_oracle":
        hits = []
        for number in asked:
            prompt = np.concatenate([context, questions[:, number]], axis=1)
            got = generate(model, prompt, max_new_tokens=2, compression=text)
            hits.append((np.asarray(got.tokens) == values[:, number]).all(-1))
        return _cell(np.stack(hits), full, got.cache)
    seen = context
    if method == "snap_reuse":
        seen, asked = np.concatenate([context, questions[:, 0]], axis=1), asked[1:]
    made = prepare(model, seen, compression=text)
    hits = [
        (np.asarray(answer(made, questions[:, n], max_new_tokens=2).tokens) == values[:, n]).all(-1)
        for n in asked
    ]
    more = {}
    if "pass_format" in text:  # what rounding the scores changes
        exact = prepare(model, seen, compression=RECALL_METHODS["kvzip_pair"].format(r=ratio))
        more["kept_as_by_exact_scores"] = round(_shared(exact.cache, made.cache), 4)
    return _cell(np.stack(hits), full, made.cache, **more)


def _shared(one: Any, other: Any) -> float:
    """Return the share of the entries of ``one`` that ``other`` keeps too."""
    same = total = 0
    for a, b in zip(one.layers, other.layers, strict=True):
        a, b = (np.asarray(x.positions).reshape(-1, x.positions.shape[-1]) for x in (a, b))
        for mine, its in zip(a, b, strict=True):
            mine = mine[mine >= 0]
            same, total = same + int(np.isin(mine, its).sum()), total + mine.size
    return same / total


def needle_cell(
    task: Recall, model: Any, method: str, ratio: float, depth: float, *, rows: int, seed: int
) -> dict[str, Any]:
    """Ask for a single pair at a given depth among filler (E2).

    Args:
        task, model, method, ratio, rows, seed: as in :func:`recall_cell`, snap methods excepted.
        depth: where the pair lies, in [0, 1].
    """
    context, keys, values = task.contexts(np.random.default_rng(seed), rows, depth=depth)
    full = _full_bytes(model, rows, context.shape[1])
    size = task.num_sinks + round(ratio * (context.shape[1] - task.num_sinks))
    window = max(1, min(16, (size - 2) // 2))
    text = "full"
    if method != "full":
        text = RECALL_METHODS[method].format(r=ratio, b=size, w=window, room=ROOM)
    made = prepare(model, context, compression=text)
    got = answer(made, task.questions(keys)[:, 0], max_new_tokens=2)
    return _cell((np.asarray(got.tokens) == values[:, 0]).all(-1), full, made.cache)


def copy_cell(
    task: Recall, model: Any, method: str, ratio: float, *, rows: int, seed: int
) -> dict[str, Any]:
    """Repeat the context from its compressed cache; share of tokens that are right (E2b).

    Args:
        task, model, method, ratio, rows, seed: as in :func:`recall_cell`, snap methods excepted.
    """
    context, _, _ = task.contexts(np.random.default_rng(seed), rows)
    full = _full_bytes(model, rows, context.shape[1])
    text = "full" if method == "full" else RECALL_METHODS[method].format(r=ratio, b=0, w=0, room=0)
    made = prepare(model, context, compression=text)
    ask = np.tile([REPEAT, ANS], (rows, 1))
    got = answer(made, ask, max_new_tokens=context.shape[1])
    return _cell(np.asarray(got.tokens) == context, full, made.cache)


def trace_cell(
    task: Trace,
    model: Any,
    method: str,
    fraction: float,
    *,
    rows: int,
    seed: int,
    checks: int,
    buffer: int,
    window: int = 8,
    steps: int | None = None,
    options: str = "",
) -> dict[str, Any]:
    """Let the model run programs by itself with a bounded cache; is the final answer right?

    Args:
        task: the task the model was trained on.
        model: the decoder.
        method: a key of ``TRACE_METHODS``, or ``"full"``.
        fraction: budget over the length of the trace; the prompt is kept beside it.
        rows: problems.
        seed: seed of the problems.
        checks: restatements per step.
        buffer: tokens between compactions.
        window: observation queries.
        steps: lines of the programs; ``None``: the task's.
        options: further arguments of the method, such as ``"mix_lambda=0.3"``.

    Returns:
        Accuracy of final answers, share of right trace tokens, mean output length, bytes.
    """
    prompt, trace = task.problems(np.random.default_rng(seed), rows, checks, steps)
    length = trace.shape[1]
    budget = max(round(fraction * length), window + 1)
    text = "full"
    if method != "full":
        kept = prompt.shape[1]
        text = TRACE_METHODS[method].format(b=kept + budget, buffer=buffer, s=kept, w=window)
        text = text.removesuffix(")") + (f", {options})" if options else ")")
    got = generate(model, prompt, max_new_tokens=length + 8, compression=text, stop_tokens=[DONE])
    tokens = np.asarray(got.tokens)
    place = np.argmax(tokens == ANS, axis=1)[:, None] + np.array([1, 2])  # what follows ANS
    said = np.take_along_axis(tokens, np.minimum(place, tokens.shape[1] - 1), axis=1)
    hits = (said == trace[:, -3:-1]).all(-1) & (tokens == ANS).any(-1)
    full = prompt.shape[1] + length
    per_slot = _full_bytes(model, rows, full)
    return _cell(
        hits,
        per_slot,
        got.cache,
        budget=budget,
        trace_tokens=length,
        right_trace_tokens=round(float((tokens[:, :length] == trace).mean()), 4),
        mean_output_length=round(float(np.asarray(got.lengths).mean()), 2),
    )


def _full_bytes(model: Any, rows: int, tokens: int) -> int:
    """Return the bytes of a full cache of so many tokens, without making it."""
    import jax

    from jaxeff.kv_cache import DenseCache, tree_bytes

    dtype = getattr(model, "dtype", jnp.bfloat16)
    make = lambda: DenseCache.init_for(model, rows, tokens, dtype=dtype)  # noqa: E731
    return tree_bytes(jax.eval_shape(make))


def lambda_options(value: float) -> str:
    """Return the spelling of R-KV's mixing weight."""
    return f"mix_lambda={value}"


def as_dict(task: Any) -> dict[str, Any]:
    """Return a task's settings for a report."""
    return {"task": type(task).__name__, **dataclasses.asdict(task)}

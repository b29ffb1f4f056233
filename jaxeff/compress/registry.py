"""Compressors by name, and the short spelling that commands and reports use."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from jaxeff.compress.base import Compressor
from jaxeff.compress.expected_attention import ExpectedAttention
from jaxeff.compress.full import FullKV
from jaxeff.compress.h2o import H2O
from jaxeff.compress.keydiff import KeyDiff
from jaxeff.compress.knorm import Knorm
from jaxeff.compress.kvzip import KVzip
from jaxeff.compress.random_eviction import Random
from jaxeff.compress.rkv import RKV
from jaxeff.compress.snapkv import SnapKV
from jaxeff.compress.streaming_llm import StreamingLLM
from jaxeff.compress.tova import TOVA
from jaxeff.compress.wrappers import AdaKV, Compose, PerLayer, Quantized

# One row per method; what is listed here is tested, documented and spelled.
COMPRESSORS: dict[str, type[Compressor]] = {
    cls.name: cls
    for cls in (
        FullKV,
        RKV,
        KVzip,
        StreamingLLM,
        SnapKV,
        H2O,
        TOVA,
        KeyDiff,
        Knorm,
        ExpectedAttention,
        Random,
        AdaKV,
        PerLayer,
        Quantized,
        Compose,
    )
}


def parse(compression: str | Compressor | None) -> Compressor:
    """Return the compressor that a short text names.

    Spellings: ``"full"``; ``"rkv:256"`` sets the method's main number; ``"kvzip(ratio=0.3,
    storage='int8')"`` sets any field by name; ``"adakv(snapkv(budget=64), floor=0.1)"`` wraps a
    method; ``"kvzip:0.3 + rkv:256"`` is ``Compose`` (the context first, then the generation).
    Capitals, ``_`` and ``-`` in names do not count.

    Args:
        compression: such a text; a compressor, which is returned as it is; or ``None`` for
            :class:`~jaxeff.compress.full.FullKV`.

    Returns:
        A compressor.

    Raises:
        ValueError: if the name, a field or a value is not known; the message lists those that are.

    Examples:
        >>> parse("rkv:256").budget, parse("rkv(budget=256, buffer=64)").buffer
        (256, 64)
        >>> parse("quantized(StreamingLLM:64, 'int8')").method.num_sinks
        4
        >>> parse("snap")
        Traceback (most recent call last):
            ...
        ValueError: compression='snap' names no method; known: adakv, compose, ...

    References:
        R-KV (arXiv 2505.24133); KVzip (arXiv 2505.23416).
    """
    if compression is None:
        return FullKV()
    if isinstance(compression, Compressor):
        return compression
    if not isinstance(compression, str):
        raise ValueError(f"compression={compression!r}; expected a text, a Compressor or None")
    parts = _split(compression, "+")
    if len(parts) > 2:
        raise ValueError(f"compression={compression!r} joins {len(parts)} methods; expected 2")
    if len(parts) == 2:
        return COMPRESSORS["compose"](context=parse(parts[0]), generation=parse(parts[1]))
    text = compression.strip()
    name = text.split(":")[0].split("(")[0]
    cls = {_plain(known): cls for known, cls in COMPRESSORS.items()}.get(_plain(name))
    if cls is None:
        known = ", ".join(sorted(COMPRESSORS))
        raise ValueError(f"compression={compression!r} names no method; known: {known}")
    options = _options(cls, text[len(name) :].strip(), compression)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(
                f"compression={compression!r}: {cls.name} has no {option!r}; it has {known}"
            )
    for field in fields.values():
        needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if needed and field.name not in options:
            raise ValueError(
                f"compression={compression!r}: {cls.name} needs {field.name}, "
                f"for example '{cls.name}({field.name}=…)'"
            )
    return cls(**options)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == mark and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _options(cls: type[Compressor], rest: str, whole: str) -> dict[str, Any]:
    """Return the fields that the part after the name sets."""
    if not rest:
        return {}
    if rest[0] == ":" and cls.primary is None:
        raise ValueError(f"compression={whole!r}: {cls.name} takes no number")
    try:
        if rest[0] == ":":
            return {cls.primary: ast.literal_eval(rest[1:].strip())}
        if rest[0] != "(" or rest[-1] != ")":
            raise SyntaxError("not a call")
        names = list(getattr(cls, "positional", ()))
        options = {}
        for item in filter(str.strip, _split(rest[1:-1], ",")):
            key, *value = _split(item, "=")
            if len(value) == 1 and key.strip().isidentifier():
                if key.strip() in options:
                    raise ValueError(f"compression={whole!r} sets {key.strip()} twice")
                options[key.strip()] = _value(value[0])
            elif not value and names:
                options[names.pop(0)] = _value(item)
            else:
                raise SyntaxError("not a keyword")
    except (SyntaxError, ValueError) as error:
        if str(error).startswith("compression="):
            raise
        raise ValueError(
            f"compression={whole!r} is not understood; write '{cls.name}:NUMBER' or "
            f"'{cls.name}(field=value, …)'"
        ) from error
    return options


def _value(text: str) -> Any:
    """Return a literal, or the method that a text such as ``rkv:64`` spells."""
    text = text.strip()
    known = {_plain(name) for name in COMPRESSORS}
    if _plain(text.split(":")[0].split("(")[0]) in known:
        return parse(text)
    return ast.literal_eval(text)

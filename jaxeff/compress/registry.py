"""Compressors by name, and the short spelling that commands and reports use."""

from __future__ import annotations

import ast
import dataclasses

from jaxeff.compress.base import Compressor
from jaxeff.compress.full import FullKV
from jaxeff.compress.kvzip import KVzip
from jaxeff.compress.rkv import RKV

COMPRESSORS: dict[str, type[Compressor]] = {cls.name: cls for cls in (FullKV, RKV, KVzip)}


def parse(compression: str | Compressor | None) -> Compressor:
    """Return the compressor that a short text names.

    Spellings: ``"full"``; ``"rkv:256"`` sets the method's main number; ``"kvzip(ratio=0.3,
    storage='int8')"`` sets any field by name.

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
        >>> parse("snap")
        Traceback (most recent call last):
            ...
        ValueError: compression='snap' names no method; known: full, kvzip, rkv

    References:
        R-KV (arXiv 2505.24133); KVzip (arXiv 2505.23416).
    """
    if compression is None:
        return FullKV()
    if isinstance(compression, Compressor):
        return compression
    if not isinstance(compression, str):
        raise ValueError(f"compression={compression!r}; expected a text, a Compressor or None")
    text = compression.strip()
    name = text.split(":")[0].split("(")[0].strip()
    if name not in COMPRESSORS:
        known = ", ".join(sorted(COMPRESSORS))
        raise ValueError(f"compression={compression!r} names no method; known: {known}")
    cls, rest = COMPRESSORS[name], text[len(name) :].strip()
    options = _options(cls, rest, compression)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(
                f"compression={compression!r}: {name} has no {option!r}; it has {known}"
            )
    for field in fields.values():
        needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if needed and field.name not in options:
            raise ValueError(
                f"compression={compression!r}: {name} needs {field.name}, "
                f"for example '{name}({field.name}=…)'"
            )
    return cls(**options)


def _options(cls: type[Compressor], rest: str, whole: str) -> dict:
    """Return the fields that the part after the name sets."""
    if not rest:
        return {}
    if rest[0] == ":" and cls.primary is None:
        raise ValueError(f"compression={whole!r}: {cls.name} takes no number")
    try:
        if rest[0] == ":":
            return {cls.primary: ast.literal_eval(rest[1:].strip())}
        call = ast.parse("f" + rest, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise SyntaxError("not a call with keywords")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"compression={whole!r} is not understood; write '{cls.name}:NUMBER' or "
            f"'{cls.name}(field=value, …)'"
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Choosing an implementation: the first candidate that gives no reason against itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("pallas_kernels")
_logged: set[tuple[str, str, str]] = set()
_explainers: dict[str, Callable[..., Explanation]] = {}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation serves a call, and why the others do not.

    Args:
      op: name of the operation.
      implementation: the one that runs, or None when no candidate takes the call.
      rejected: reason by name of each candidate that comes before it (or of all).
      notes: facts about the chosen implementation that a user should know.
    """

    op: str
    implementation: str | None
    rejected: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation or 'no implementation'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def choose(op: str, implementation: str | None, reasons: Mapping[str, str | None]) -> Explanation:
    """Applies the dispatch rule to the candidates' own statements.

    A named implementation is that one or nothing. ``None`` takes the first candidate without a
    reason against it.

    Args:
      op: name of the operation, for messages.
      implementation: name given by the user, or None.
      reasons: ordered; for each candidate why it cannot serve the call, or None if it can.

    Returns:
      An `Explanation`; its `implementation` is None when nothing serves the call.

    Raises:
      ValueError: `implementation` is not a candidate.

    >>> str(choose("attention", None, {"mosaic": "needs a GPU", "xla": None}))
    'attention: xla\\n  not mosaic: needs a GPU'
    """
    if implementation is not None:
        if implementation not in reasons:
            names = ", ".join(repr(name) for name in reasons)
            raise ValueError(
                f"implementation must be None or one of {names}; got {implementation!r}"
            )
        reason = reasons[implementation]
        rejected = {} if reason is None else {implementation: reason}
        return Explanation(op, None if reason else implementation, rejected)
    rejected = {}
    for name, reason in reasons.items():
        if reason is None:
            return Explanation(op, name, rejected)
        rejected[name] = reason
    return Explanation(op, None, rejected)


def resolve(op: str, implementation: str | None, reasons: Mapping[str, str | None]) -> str:
    """Like `choose`, but returns the name, logs each new reason once and raises if none is left.

    Args:
      op: name of the operation, for messages.
      implementation: name given by the user, or None.
      reasons: ordered; for each candidate why it cannot serve the call, or None if it can.

    Returns:
      Name of the implementation to run.

    Raises:
      ValueError: `implementation` is not a candidate.
      NotImplementedError: no candidate serves the call; the message holds every reason.

    >>> resolve("attention", None, {"mosaic": "needs a GPU", "xla": None})
    'xla'
    """
    choice = choose(op, implementation, reasons)
    if choice.implementation is None:
        detail = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected.items())
        able = [name for name, reason in reasons.items() if reason is None]
        hint = f". These implementations take the call: {', '.join(able)}" if able else ""
        raise NotImplementedError(f"{op}: {detail}{hint}")
    for name, reason in choice.rejected.items():
        if (op, name, reason) not in _logged:
            _logged.add((op, name, reason))
            logger.info("%s: using %s, not %s: %s", op, choice.implementation, name, reason)
    return choice.implementation


def register_explainer(op: str, explainer: Callable[..., Explanation]) -> None:
    """Makes ``explain(op, ...)`` answer for an operation.

    Args:
      op: name of the operation.
      explainer: takes the operation's own arguments (arrays or shapes), returns an `Explanation`.
    """
    _explainers[op] = explainer


def explain(op: str = "attention", *args, **kwargs) -> Explanation:
    """Says which implementation a call would use, from shapes alone, without running it.

    Args:
      op: ``"attention"``, ``"decode_attention"`` or ``"matmul"``.
      *args: the operation's arguments; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: the operation's keyword arguments.

    Returns:
      An `Explanation`: the choice, every rejected candidate with its reason, and notes.

    Raises:
      ValueError: the operation is unknown, or its arguments are wrong.

    >>> import jax, jax.numpy as jnp
    >>> import pallas_kernels.ops.attention
    >>> x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    >>> explain("attention", x, x, x, implementation="xla").implementation
    'xla'
    """
    if op not in _explainers:
        names = ", ".join(repr(name) for name in sorted(_explainers))
        raise ValueError(f"op must be one of {names}; got {op!r}")
    return _explainers[op](*args, **kwargs)

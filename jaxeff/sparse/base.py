"""What the static patterns share."""

from __future__ import annotations


def lengths(q_len: int, kv_len: int | None) -> tuple[int, int]:
    """Return ``(T, S)``; ``S`` is ``T`` where it is not given.

    >>> lengths(4, None)
    (4, 4)
    """
    kv_len = q_len if kv_len is None else kv_len
    check_at_least(1, q_len=q_len, kv_len=kv_len)
    return q_len, kv_len


def check_at_least(least: int, **sizes: int) -> None:
    """Raise ``ValueError`` for the first size below ``least``."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}; expected at least {least}")

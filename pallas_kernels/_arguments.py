# SPDX-License-Identifier: Apache-2.0
"""Checks that the functions with the SageAttention package's names share."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable

LAYOUTS = ("HND", "NHD")
# Names of torch's scaled_dot_product_attention that people pass, and what serves them.
_ELSEWHERE = {
    "attn_mask": "pallas_kernels.dot_product_attention(..., mask=...) takes masks",
    "mask": "pallas_kernels.dot_product_attention(..., mask=...) takes masks",
    "dropout_p": "attention dropout is not served; leave it out",
    "enable_gqa": "grouped heads need no switch; leave it out",
    "scale": "it is called sm_scale here",
}


def strict(function: Callable) -> Callable:
    """Turns an unknown keyword into a TypeError that names the nearest known one."""
    known = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else _ELSEWHERE.get(name)
                hint = hint or f"it takes {', '.join(known)}"
                raise TypeError(f"{function.__name__}() takes no argument {name!r}; {hint}")
        return function(*args, **kwargs)

    return checked


def check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
    # A mask in the fourth position, as torch has it, lands in tensor_layout.
    if not isinstance(value, str) or value not in allowed:
        shown = repr(value) if isinstance(value, str | None) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {shown}")

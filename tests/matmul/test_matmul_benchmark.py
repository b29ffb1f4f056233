# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases are well formed, and every kernel in it lowers."""

import json

import pytest

from experiments.benchmarks import matmul


def test_cases_lower_and_lines_print():
    cases = matmul.cases()
    assert len({json.dumps(case, sort_keys=True) for case in cases}) == len(cases)
    kernels = [case for case in cases if "kernel" in case]
    assert {matmul.lower(case)["lowered"] for case in kernels[::4]} == {"yes"}


def test_rows_are_compared_with_bf16_and_the_copy():
    copy = {"case": {"stage": "fast", "what": "copy"}, "result": {"ms": 1.0, "gbps": 2.0}}
    rows = [copy, *(
        {"case": {"stage": "fast", "what": what, "m": 1}, "seconds": 1.0,
         "result": {"ms": ms, "gbps": 1.0}} for what, ms in (("bf16", 3.0), ("nvfp4", 1.0))
    )]  # fmt: skip
    matmul._compare(rows)
    assert rows[2]["result"] == {"ms": 1.0, "gbps": 1.0, "share_of_copy": 0.5, "over_bf16": 3.0}
    assert matmul._line(rows[2]).startswith("fast 1.0 s {'what': 'nvfp4', 'm': 1}: ms 1, gbps 1")


@pytest.mark.parametrize("what", ["bf16", "int8", "nf4 with barrier",
                                  "nvfp4 without barrier", "int8 codes, both K-major"])  # fmt: skip
def test_what_is_timed_runs(what):
    function, args = matmul.fast_call({"what": what, "m": 2, "k": 64, "n": 64})
    assert function(*args).shape == (2, 64)

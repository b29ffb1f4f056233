# SPDX-License-Identifier: Apache-2.0
"""The sm90 products on a GPU, against the oracle on the same codes.

The cases are those of `experiments.benchmarks.matmul`, which runs each under a time limit.
"""

import json

import pytest

from experiments.benchmarks import matmul

pytestmark = pytest.mark.gpu
CASES = [case for case in matmul.cases() if case["stage"] == "correct"]


@pytest.mark.parametrize("case", CASES, ids=[json.dumps(case) for case in CASES])
def test_agrees_with_the_oracle(case):
    matmul.run_correct(case)

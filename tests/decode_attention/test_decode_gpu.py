# SPDX-License-Identifier: Apache-2.0
"""The sm90 decode kernels on a GPU, against the oracle on the same codes.

The cases are those of `experiments.benchmarks.decode`, which runs each under a time limit.
"""

import json

import pytest

from experiments.benchmarks import decode

pytestmark = pytest.mark.gpu
CASES = [case for case in decode.cases() if case["stage"] == "correct" or case.get("check")]


@pytest.mark.parametrize("case", CASES, ids=[json.dumps(case) for case in CASES])
def test_agrees_with_the_oracle(case):
    stages = {"correct": decode.run_correct, "scores": decode.run_scores}
    stages.get(case["stage"], decode.run_similar)(case)

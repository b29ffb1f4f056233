# SPDX-License-Identifier: Apache-2.0
"""The short notebooks run from top to bottom, as scripts: a cell that raises fails its test.

Each takes less than two minutes on an idle machine: they train, so their programs are optimised,
unlike those of other tests. Those on flows and on methods of one's own take that long here beside
other tests: ``make notebooks`` runs them all and keeps their figures.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("01", "02", "03", "04", "05")
SECONDS = 300  # two minutes on two cores with other tests beside it


@pytest.mark.slow
@pytest.mark.parametrize("number", SHORT)
def test_a_notebook_runs(number, optimised_environment):
    (source,) = (ROOT / "notebooks").glob(f"{number}_*.py")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(source)],
        cwd=ROOT,
        env={**optimised_environment, "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_notebook_was_executed():
    """The .ipynb beside it holds outputs."""
    for source in (ROOT / "notebooks").glob("[0-9]*.py"):
        text = source.with_suffix(".ipynb").read_text()
        assert '"output_type"' in text, source.name

"""Generated documents match the code, and named result files exist."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_support_matrix_is_up_to_date():
    module = runpy.run_path(str(ROOT / "tools" / "support_matrix.py"))
    assert module["TARGET"].read_text() == module["render"](), "run python tools/support_matrix.py"


def test_every_result_file_that_a_document_names_is_there():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"experiments/[A-Za-z0-9_./-]+\.json", page.read_text())
    }
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]

"""The snippets of docs/kv_cache.md run in order."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kv_cache.md"


def test_snippets_run_in_order(capsys):
    parts = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names = {}
    for number, part in enumerate(parts):
        exec(compile(part, f"{PAGE.name}, snippet {number}", "exec"), names)
    said = capsys.readouterr().out.split()
    assert float(said[0]) < 0.5  # bytes of R-KV's cache over the full one's
    assert names["joined"].shape == (1, 1, 4, 16)

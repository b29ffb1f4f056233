"""The snippets of docs/sparse.md run."""

import re
from pathlib import Path

import jax.numpy as jnp

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sparse.md"


def test_snippets_run_in_order(capsys):
    text = PAGE.read_text()
    codes = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(codes) == text.count("```") // 2 >= 7
    names = {}
    for number, code in enumerate(codes):
        exec(compile(code, f"{PAGE.name}: snippet {number}", "exec"), names)
        assert jnp.isfinite(names.pop("out")).all(), number
    shown = capsys.readouterr().out
    assert "█" in shown and "vertical_slash" in shown

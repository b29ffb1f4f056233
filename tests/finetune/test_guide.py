"""The snippets of the guide run, in order."""

import re
from pathlib import Path


def test_snippets_of_the_guide_run():
    text = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)

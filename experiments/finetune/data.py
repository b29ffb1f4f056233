"""Two corpora that every machine has: Python's source code, and the prose in its docstrings."""

import ast
import sysconfig
from pathlib import Path

import numpy as np

from jaxeff.data import Corpus, stdlib_corpus


def corpora(max_bytes: int, validation: float = 0.15) -> tuple[Corpus, Corpus]:
    """Source code to pretrain on, and the docstrings of the same files to finetune on.

    A file is held out from both or from neither, so no held-out docstring was seen in pretraining.
    Docstrings are undented, at least 80 characters long, and separated by an empty line.

    Args:
      max_bytes: upper limit on the source code.
      validation: fraction of files held out.

    Returns:
      ``(code, docstrings)``.
    """
    code = stdlib_corpus(max_bytes=max_bytes, validation=validation)
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = [
        np.frombuffer(
            "\n\n".join(t for f in files for t in docstrings(root / f)).encode(), np.uint8
        )
        for files in (code.train_files, code.validation_files)
    ]
    return code, Corpus(*parts, code.train_files, code.validation_files)


def docstrings(file: Path, shortest: int = 80) -> list[str]:
    """The docstrings of a Python file, in its order; none if it does not parse."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # the library's tests hold broken files on purpose
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if len(text) >= shortest]

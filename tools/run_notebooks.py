"""Execute py:percent notebooks and write the .ipynb beside each, with figures kept.

    python tools/run_notebooks.py notebooks            all *.py in the folder
    python tools/run_notebooks.py notebooks/02_x.py    one of them

Every notebook has two minutes; a cell that raises, or a notebook that takes longer, fails the run.
Needs the extra ``notebooks`` (jupytext, nbclient, ipykernel, matplotlib).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 120


def execute(source: Path, limit: float) -> float:
    """Run one notebook in a fresh kernel at the repository root; return its seconds."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python"
    }  # fmt: skip
    started = time.monotonic()
    client = NotebookClient(notebook, timeout=limit, kernel_name="python3")
    client.execute(cwd=str(ROOT))
    seconds = time.monotonic() - started
    _strip(notebook)
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    if seconds > limit:
        raise TimeoutError(f"{source.name} took {seconds:.0f} s; expected at most {limit:.0f} s")
    return seconds


def _strip(notebook) -> None:
    """Drop what differs between two equal runs, so that a diff shows results only."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = output.text.replace(str(ROOT), ".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks named on the command line; 0 if all of them pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="folders or .py notebooks")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for each")
    options = parser.parse_args(arguments)
    sources = [
        source
        for path in options.paths
        for source in (sorted(path.glob("[0-9]*.py")) if path.is_dir() else [path])
    ]
    if not sources:
        print(f"no notebooks in {', '.join(map(str, options.paths))}", file=sys.stderr)
        return 1
    # The kernel must find the packages of this checkout wherever the command was started.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    failed = []
    for source in sources:
        try:
            print(f"{source.name}: {execute(source, options.limit):.0f} s", flush=True)
        except Exception as error:
            failed.append(source.name)
            print(f"{source.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the wheel, install it in an empty environment, run the README program from outside."""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme_program(readme: str) -> str:
    """Return the first ```python block of the README."""
    match = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    if match is None:
        raise SystemExit("README.md has no ```python block")
    return match.group(1)


def run(*command: object, cwd: Path) -> None:
    """Run a command and stop at the first failure."""
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def main() -> None:
    """Do it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", work / "dist", ROOT, cwd=work)
        (wheel,) = (work / "dist").glob("*.whl")
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            wheel,
            cwd=work,
        )
        program = work / "program.py"
        program.write_text(readme_program((ROOT / "README.md").read_text()))
        run(python, program, cwd=work)
        run(python, "-m", "jaxeff", "--help", cwd=work)
    print(f"{wheel.name}: installed in an empty environment, README program ran")


if __name__ == "__main__":
    main()

"""The direction of dependence: experiments, tests -> jaxeff -> pallas_kernels -> jax."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each package may never import, and why it is checked by reading: an import that only
# happens inside a function would escape a test that merely imports the package.
FORBIDDEN = {
    "pallas_kernels": {"jaxeff", "experiments", "tests", "flax", "optax", "orbax", "rich", "tyro"},
    "jaxeff": {"experiments", "tests", "torch", "transformers"},
    "pallas_kernels/formats": {"pallas_kernels.ops", "pallas_kernels.masks"},
    "pallas_kernels/masks": {"pallas_kernels.ops"},
    "jaxeff/nn": {"jaxeff.models", "jaxeff.compress", "jaxeff.train", "jaxeff.generate"},
    "jaxeff/kv_cache": {"jaxeff.models", "jaxeff.nn", "jaxeff.compress", "jaxeff.train"},
    "jaxeff/quant": {"jaxeff.models", "jaxeff.train", "jaxeff.compress"},
    "jaxeff/compress": {"jaxeff.models", "jaxeff.nn", "jaxeff.train"},
    "jaxeff/sparse": {"jaxeff.models", "jaxeff.nn", "jaxeff.train", "jaxeff.compress"},
    "jaxeff/optim": {"jaxeff.models", "jaxeff.nn", "jaxeff.train"},
}


def imported_modules(path: Path) -> set[str]:
    """All absolute module names that a file imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_no_upward_import(folder):
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported_modules(path)
        for banned in FORBIDDEN[folder]
        if name == banned or name.startswith(f"{banned}.")
    ]
    assert not upward, "\n".join(upward)


def test_core_imports_no_optional_package_at_module_level():
    """Extras are imported where they are used, so that a plain install imports cleanly."""
    optional = {"safetensors", "tokenizers", "matplotlib", "torch", "transformers", "triton"}
    early = []
    for package in ("pallas_kernels", "jaxeff"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name.split(".")[0] for alias in node.names}
                    names.add((getattr(node, "module", None) or "").split(".")[0])
                    early += [f"{path.relative_to(ROOT)}: {name}" for name in names & optional]
    assert not early, early

"""setup.cfg declares what the code imports, no more and no less, and constraints.txt pins all of it.

Imports inside functions count, and so do `importlib.import_module("name")` and `find_spec("name")`.
"""

import ast
import configparser
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ksub_ds", "preprocessing", "launch")

INSTALLED = importlib.metadata.packages_distributions()
# Which distributions bring a module, where that cannot be read from what is installed: extras, and twins.
DISTRIBUTIONS = {
    "faiss": {"faiss-cpu", "faiss-gpu"},
    "fasttext": {"fasttext-predict"},
    "kenlm": {"kenlm"},
    "onnxruntime": {"onnxruntime"},
    "onnxscript": {"onnxscript"},
    "splintr": {"splintr-rs"},
    "triton": {"torch"},  # comes with torch for CUDA
}
# Declared, though no file of ours imports it.
USED_BY = {
    "tensorboard": "DeepSpeed's monitor writes RUN/tensorboard through torch",
    "onnx": "torch.onnx.export, for `ksub export --onnx`",
    "onnxscript": "torch.onnx.export, for `ksub export --onnx`",
    "sentence-transformers": "users who read an exported sentence encoder",
    "pdoc": "docs/build_api.py",
}
TOOLS_OF_TESTS = "test"  # the extra whose packages are programs or are imported by tests and benchmarks


def imported(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "find_spec") and isinstance(node.args[0].value, str):
                yield node.args[0].value.split(".")[0]


def modules() -> dict[str, Path]:
    """Every foreign module that is imported, with one file that imports it."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found |= {name: path.relative_to(ROOT) for name in imported(path)}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, *FOLDERS}}


def distributions(module: str) -> set[str]:
    """Canonical names of the distributions that bring a module."""
    known = DISTRIBUTIONS.get(module) or INSTALLED.get(module, ())
    return {canonicalize_name(name) for name in known}


def declared() -> dict[str, list[Requirement]]:
    """Requirements by extra; those of install_requires under ''."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = {"": config["options"]["install_requires"]} | dict(config["options.extras_require"])
    lines = {extra: [line.strip() for line in text.splitlines()] for extra, text in texts.items()}
    return {
        extra: [Requirement(line) for line in found if line and not line.startswith("#")]
        for extra, found in lines.items()
    }


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_what_is_imported_is_declared() -> None:
    known = set().union(*(names(found) for extra, found in declared().items() if extra != TOOLS_OF_TESTS))
    faults = [f"{path} imports {module}" for module, path in modules().items() if not distributions(module) & known]
    assert not faults, "setup.cfg declares no package for: " + "; ".join(faults)


def test_what_is_declared_is_used() -> None:
    used = set().union(*map(distributions, modules())) | set(USED_BY)
    left = {extra: names(found) - used for extra, found in declared().items() if extra != TOOLS_OF_TESTS}
    assert not any(left.values()), f"declared in setup.cfg and not imported: {left}"


def test_what_is_declared_is_pinned_in_range() -> None:
    """And every pin is one version."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        pin = Requirement(line)
        assert str(pin.specifier).startswith("=="), line
        pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    for requirement in (each for found in declared().values() for each in found):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"constraints.txt pins {version}, setup.cfg says {requirement}"


@pytest.mark.parametrize("module", ["deepspeed", "faiss", "fasttext", "google", "kenlm", "mpi4py", "pydantic", "torch"])
def test_the_reader_of_imports_sees_them(module: str) -> None:
    """Guards the tests above against a reader that finds nothing."""
    assert module in modules() and distributions(module)


def test_the_reader_of_requirements_sees_them() -> None:
    found = declared()
    assert {"cpu", "gpu", "fasttext", "lm", "interop", "test"} <= set(found)
    assert {"torch", "deepspeed"} <= names(found[""]) and names(found["gpu"]) == {"faiss-gpu"}


def test_imports_of_every_form_are_read(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b as x\nfrom . import no\nfrom .no import no\n"
        "def f():\n    from c.d import e\n    importlib.import_module('g')\n    find_spec('h.i')\n    g(f'{x}')\n"
    )
    assert set(imported(path)) == {"a", "c", "g", "h"}

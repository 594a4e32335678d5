"""The shape of the tree: imports go strictly down, none go in a circle, heavy packages have one home each.

The layers are those of the table in docs/architecture.md, which these tests read.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Which packages the scripts may import.
SCRIPTS_MAY_IMPORT = {"preprocessing": {"common", "codes", "corpus", "vectors"}, "launch": set()}

# Heavy packages and the only places under ksub_ds/, preprocessing/ and launch/ that may import them.
HOMES = {
    "deepspeed": ("ksub_ds.common.distributed", "ksub_ds.pretrain"),
    "mpi4py": ("ksub_ds.common.distributed", "ksub_ds.common.mpi"),
    "faiss": ("ksub_ds.codes",),
    "datasets": ("ksub_ds.corpus", "ksub_ds.evaluate"),
    "matplotlib": ("ksub_ds.analysis",),
}
MOST_MODULES = 17  # in one folder, __init__.py apart
RECIPE_OWNS = re.compile(r"batch|^lr$|learning_rate|optimizer|scheduler|fp16|bf16|amp|autocast|clipping|dtype")
MECHANICAL_KEYS = {"allgather_bucket_size", "reduce_bucket_size", "offload_optimizer"}


def modules() -> dict[str, Path]:
    """Every module of the package and of the script folders, by dotted name."""
    found = {}
    for folder in ("ksub_ds", "preprocessing", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, submodules: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute dotted target, line) of every import in a module, inside functions too.

    Args:
        submodules: give `package.name` for each name of `from package import name`, which may be a module.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "ksub_ds" or submodules:  # `from ksub_ds import corpus`: the package is among the names
                yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield source, node.lineno


def is_under(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def layers() -> dict[str, int]:
    """The layer of each package of ksub_ds, from the table in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `ksub_ds/(\w+)/` \|", text, re.MULTILINE)
    return {package: int(number) for number, package in rows}


def graph() -> dict[str, set[str]]:
    """Which modules of ksub_ds each of them imports, inside functions and for type checking too."""
    known = {name: path for name, path in modules().items() if name.startswith("ksub_ds")}
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for target, _ in imports(name, path, submodules=True):
            while target and target not in known:  # a name in a module
                target = target.rpartition(".")[0]
            if target and target != name:
                edges[name].add(target)
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Nodes that import each other in a circle; empty if there are none."""
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    while used := set().union(*left.values()) if left else set():
        top = [name for name in left if name not in used]
        if not top:
            break
        for name in top:
            del left[name]
    return sorted(left)


def test_every_package_has_a_layer_of_its_own() -> None:
    packages = {path.parent.name for path in (ROOT / "ksub_ds").glob("*/__init__.py")}
    assert set(layers()) == packages
    assert len(set(layers().values())) == len(packages)


def test_imports_go_down_only() -> None:
    layer, faults = layers(), []
    for name, path in modules().items():
        top, *rest = name.split(".")
        package = rest[0] if rest else ""
        for target, line in imports(name, path):
            if target.split(".")[0] in ("preprocessing", "launch", "experiments", "benchmarks", "tests"):
                faults.append(f"{path}:{line} imports {target}")
            if not target.startswith("ksub_ds.") or target == "ksub_ds.__version__":
                continue
            below = target.split(".")[1]
            if top != "ksub_ds":
                allowed = below in SCRIPTS_MAY_IMPORT[top]
            else:
                allowed = not package or below == package or layer[below] < layer[package]
            if not allowed:
                faults.append(f"{path}:{line} imports {target}")
    assert not faults, "\n".join(faults)


def test_no_module_is_in_an_import_circle() -> None:
    assert not circle(graph())


def test_no_folder_is_in_an_import_circle() -> None:
    """A package inside a package (corpus.shards, evaluate.queue) has its place in an order too."""
    folders: dict[str, set[str]] = {}
    home = {name: name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    for name, targets in graph().items():
        if name != "ksub_ds":
            folders.setdefault(home[name], set()).update(home[target] for target in targets if target != "ksub_ds")
    assert not circle({folder: targets - {folder} for folder, targets in folders.items()})


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in modules().values()}:
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= MOST_MODULES, f"{folder} holds {len(names)} modules"


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert {Path("codes"), Path("model"), Path("docs")} <= folders, "the search finds nothing"
    for folder in folders:
        assert (ROOT / "ksub_ds" / folder).is_dir() or (ROOT / folder).is_dir(), f"tests/{folder} tests no folder"


def test_the_class_names_are_unique() -> None:
    """A class named twice makes every search for it ambiguous; names with a leading underscore are a module's own."""
    homes: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert len(homes) > 50, "the search finds nothing"
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_circles_are_found() -> None:
    """Guards the tests above against a search that finds nothing."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    edges = graph()
    assert "ksub_ds.codes.table" in edges["ksub_ds.model.embedding"]
    assert any("ksub_ds.codes.clustering" in edges[name] for name in edges if name.startswith("ksub_ds.convert"))


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    faults = [
        f"{path}:{line}"
        for name, path in modules().items()
        for target, line in imports(name, path)
        if target.split(".")[0] == package and not any(is_under(name, home) for home in HOMES[package])
    ]
    assert not faults, f"{package} belongs to {HOMES[package]}: {faults}"


def test_no_module_is_named_for_odds_and_ends() -> None:
    for name in modules():
        assert not re.search(r"utils?\b|helpers?\b|manager", name), name


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    """Guards the tests above against a reader that finds nothing."""
    path = tmp_path / "module.py"
    path.write_text(
        "import faiss.contrib\nfrom ..corpus import masking\nfrom ksub_ds import model\n"
        "def f():\n    from ksub_ds.pretrain.engine import build_engine\n"
    )
    targets = {target for target, _ in imports("ksub_ds.codes.module", path)}
    assert targets == {"faiss.contrib", "ksub_ds.corpus", "ksub_ds.model", "ksub_ds.pretrain.engine"}


def keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


def test_deepspeed_configs_hold_mechanics_only() -> None:
    """Batch sizes, learning rate, precision and clipping have one owner: the recipe."""
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert files, "ds_configs/ holds no configuration"
    for path in files:
        config = json.loads(path.read_text(encoding="utf-8"))
        owned = [key for key in keys(config) if RECIPE_OWNS.search(key) and key not in MECHANICAL_KEYS]
        assert not owned, f"{path.name}: {owned} belong to the recipe"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"
    folders = "ksub_ds|preprocessing|launch|ds_configs|experiments|benchmarks|docs|tests"
    for name in set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text)):
        assert (ROOT / name).exists(), f"{document} names {name}"
    for name in set(re.findall(r"(?:`|^ +)make ([a-z]+)", text, re.MULTILINE)):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), name

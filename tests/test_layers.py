"""The house keeps its shape: imports go down only, heavy packages have one home each, named files exist.

The table of rooms is docs/architecture.md's; change both together.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room of ksub_ds stands on. A name with a dot admits that one module only.
MAY_IMPORT = {
    "common": set(),
    "codes": {"common"},
    "corpus": {"common"},
    "model": {"common", "codes"},
    "vectors": {"common", "codes", "corpus", "model", "pretrain.export"},
    "pretrain": {"common", "codes", "corpus", "model"},
    "cluster": {"common", "codes", "corpus"},
    "evaluate": {"common", "codes", "corpus", "model", "pretrain", "cluster.hostfile"},
    "analysis": {"common", "codes", "corpus", "model", "vectors", "pretrain", "evaluate"},
    "cli": {"common", "codes", "corpus", "model", "vectors", "pretrain", "evaluate", "analysis", "cluster"},
    "": {"common", "codes", "corpus", "model", "vectors", "pretrain", "evaluate", "analysis", "cluster"},  # __init__.py
}
SCRIPTS_MAY_IMPORT = {"preprocessing": {"common", "codes", "corpus", "vectors"}, "launch": set()}

# Heavy packages and the only places under ksub_ds/, preprocessing/ and launch/ that may import them.
HOMES = {
    "deepspeed": ("ksub_ds.common.distributed", "ksub_ds.pretrain"),
    "mpi4py": ("ksub_ds.common.meeting", "ksub_ds.common.mpi"),
    "faiss": ("ksub_ds.codes",),
    "datasets": ("ksub_ds.corpus", "ksub_ds.evaluate"),
    "matplotlib": ("ksub_ds.analysis",),
    "plotly": ("ksub_ds.analysis",),
}
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


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """(absolute dotted target, line) of every import in a module, inside functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "ksub_ds":  # `from ksub_ds import corpus`: the room is among the names
                yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield source, node.lineno


def is_under(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def test_the_table_has_no_ways_up() -> None:
    """The table itself is a set of floors: no room stands on itself by a detour."""
    stands_on = {room: {target.split(".")[0] for target in targets} for room, targets in MAY_IMPORT.items()}
    placed: set[str] = set()
    while len(placed) < len(stands_on):
        free = {room for room, targets in stands_on.items() if room not in placed and targets <= placed}
        assert free, f"rooms in a circle: {sorted(set(stands_on) - placed)}"
        placed |= free


def test_imports_go_down_only() -> None:
    faults = []
    for name, path in modules().items():
        top, *rest = name.split(".")
        room = rest[0] if rest else ""
        allowed = MAY_IMPORT.get(room) if top == "ksub_ds" else SCRIPTS_MAY_IMPORT[top]
        assert allowed is not None, f"{path}: room {room!r} is not in the table"
        for target, line in imports(name, path):
            if target.split(".")[0] in ("preprocessing", "launch", "experiments", "benchmarks", "tests"):
                faults.append(f"{path}:{line} imports {target}")
            if not target.startswith("ksub_ds.") or target == "ksub_ds.__version__":
                continue
            inside = target.removeprefix("ksub_ds.")
            own_room = top == "ksub_ds" and (is_under(inside, room) or not room)
            if not own_room and not any(is_under(inside, place) for place in allowed):
                faults.append(f"{path}:{line} imports {target}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    faults = [
        f"{path}:{line}"
        for name, path in modules().items()
        for target, line in imports(name, path)
        if target.split(".")[0] == package and not any(is_under(name, home) for home in HOMES[package])
    ]
    assert not faults, f"{package} belongs to {HOMES[package]}: {faults}"


def test_no_room_for_odds_and_ends() -> None:
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

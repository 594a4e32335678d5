"""One self-contained modelling file: our classes for users who have transformers and torch but not ksub_ds.

transformers runs a file that lies with the weights when `trust_remote_code=True` is given. This one is put together
from the project's own sources: from the wanted classes on, every definition they use, and theirs, in order. So no
second copy of the code has to be kept.
"""

import ast
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksub_ds.common.files import atomic_path, read_json, write_json

FILE = "modeling_ksub.py"
PACKAGE = "ksub_ds"
HEADER = '''"""Models over sub-embeddings, in one file, written by `ksub export --remote-code` (ksub_ds {version})
from its own sources: change those, not this. Needs transformers, torch, numpy, safetensors. Apache-2.0."""
'''


@dataclass
class _Module:
    """One source file: its definitions by name, and where its other names come from."""

    name: str
    definitions: dict[str, str] = field(default_factory=dict)  # name -> source, with the comment above it
    uses: dict[str, set[str]] = field(default_factory=dict)  # name -> names in that source
    ours: dict[str, str] = field(default_factory=dict)  # imported name -> module of this package
    others: dict[str, str] = field(default_factory=dict)  # imported name -> import statement


def write_remote_code(folder: Path, model: Any) -> None:
    """Write the modelling file into a saved folder and name its classes in config.json."""
    import ksub_ds
    from ksub_ds.model.families import TASKS
    from ksub_ds.model.registration import family_of, model_classes

    bare, config_class = family_of(model), type(model).config_class
    heads = model_classes(bare)
    written_out = [each.__name__ for auto, each in heads.items() if auto not in TASKS]
    code = bundle(bare.__module__, [config_class.__name__, *written_out, "add_task_models"])
    code += f"\n\nadd_task_models({bare.__name__})\n"
    with atomic_path(folder / FILE) as temporary:
        temporary.write_text(HEADER.format(version=ksub_ds.__version__) + "\n" + code, encoding="utf-8")
    config = read_json(folder / "config.json")
    classes = {"AutoConfig": config_class} | {auto.__name__: each for auto, each in heads.items()}
    config["auto_map"] = {name: f"{Path(FILE).stem}.{each.__name__}" for name, each in classes.items()}
    write_json(folder / "config.json", config)


def bundle(home: str, names: list[str]) -> str:
    """Return the source of the named definitions of module `home` and of everything in this package that they use."""
    modules: dict[str, _Module] = {}
    order: list[str] = []
    wanted: set[tuple[str, str]] = set()
    imports: set[str] = set()

    def visit(module_name: str) -> _Module:
        if module_name not in modules:
            modules[module_name] = module = _read(module_name)
            for source in module.ours.values():
                visit(source)
            order.append(module_name)  # after all it stands on
        return modules[module_name]

    todo = [(home, name) for name in names]
    while todo:
        module_name, name = todo.pop()
        module = visit(module_name)
        if (module_name, name) in wanted:
            continue
        if name not in module.definitions:  # imported there from elsewhere
            todo.append((module.ours[name], name))
            continue
        wanted.add((module_name, name))
        for used in module.uses[name]:
            if used in module.definitions:
                todo.append((module_name, used))
            elif used in module.ours:
                todo.append((module.ours[used], used))
            elif used in module.others:
                imports.add(module.others[used])
    chosen = [(source, name) for source in order for name in modules[source].definitions if (source, name) in wanted]
    bound = [name for _, name in chosen]
    assert len(set(bound)) == len(bound), f"two definitions of one name: {sorted(bound)}"
    parts: list[str] = []
    for source, name in chosen:
        text = modules[source].definitions[name]
        if not parts or parts[-1] != text:  # a statement that binds two names stands once
            parts.append(text)
    return "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(parts) + "\n"


def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, module, previous_end = source.split("\n"), _Module(name), 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                statement = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                module.others[alias.asname or alias.name.split(".")[0]] = statement
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                module.ours[alias.name] = str(node.module)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                statement = f"from {node.module} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                module.others[alias.asname or alias.name] = statement
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            text = "\n".join(lines[previous_end : node.end_lineno]).strip("\n")
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            for bound in _bound_names(node):
                module.definitions[bound], module.uses[bound] = text, used
        previous_end = node.end_lineno or previous_end
    return module


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]

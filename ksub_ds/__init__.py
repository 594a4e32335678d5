"""ksub_ds: masked and causal language models whose embedding is K small tables and a code per token.

Importing ksub_ds registers its models with transformers' Auto classes. The public names below are imported when
first used.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CodeTable": "ksub_ds.codes.table",
    "positional_codes": "ksub_ds.codes.positional",
    "plain_codes": "ksub_ds.codes.positional",
    "clustered_codes": "ksub_ds.codes.clustering",
    "SubEmbedding": "ksub_ds.model.embedding",
    "factorized_cross_entropy": "ksub_ds.model.softmax",
    "KSubRobertaConfig": "ksub_ds.model.configuration",
    "KSubRobertaModel": "ksub_ds.model.roberta",
    "KSubRobertaForMaskedLM": "ksub_ds.model.roberta",
    "KSubRobertaForSequenceClassification": "ksub_ds.model.roberta",
    "replace_embeddings": "ksub_ds.model.replacement",
    "compress": "ksub_ds.convert.compress",
}

__all__ = ["__version__", *_HOMES]


def _is_own_program() -> bool:
    """Return whether the running program is one of this project's own.

    Registering imports torch and transformers, which takes seconds. Our programs (`ksub`, `python -m ksub_ds...`,
    the scripts in launch/, preprocessing/ and benchmarks/, and what these spawn) register where they open a model, so
    that `ksub --help`, the launcher and the workers of a tokenizing pool start at once.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python is still looking for the module; its name stands where argv[0] was taken from
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        return module.split(".")[0] == "ksub_ds"
    path, package = Path(program).resolve(), Path(__file__).resolve().parent
    scripts = [package.parent / folder for folder in ("launch", "preprocessing", "benchmarks", "benchmarks/gpu")]
    return path.name == "ksub" or package in path.parents or path.parent in scripts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ksub_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


if not _is_own_program():
    from ksub_ds.model.registration import register as _register

    _register()

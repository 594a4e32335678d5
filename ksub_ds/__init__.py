"""ksub_ds: masked language models whose embedding is K small tables and a code per token.

Names are imported when first used, so that `import ksub_ds` is quick; transformers' Auto classes
know our models once both are imported.
"""

import importlib
from typing import Any

from ksub_ds.model.auto import register

__version__ = "0.1.0"

_HOMES = {
    "CodeTable": "ksub_ds.codes.table",
    "positional_codes": "ksub_ds.codes.positional",
    "plain_codes": "ksub_ds.codes.positional",
    "clustered_codes": "ksub_ds.codes.clustering",
    "SubEmbedding": "ksub_ds.model.embedding",
    "factorized_cross_entropy": "ksub_ds.model.softmax",
    "KSubRobertaConfig": "ksub_ds.model.configuration",
    "KSubRobertaModel": "ksub_ds.model.modeling",
    "KSubRobertaForMaskedLM": "ksub_ds.model.modeling",
    "KSubRobertaForSequenceClassification": "ksub_ds.model.modeling",
    "replace_embeddings": "ksub_ds.model.replacement",
    "compress": "ksub_ds.convert.compress",
}

__all__ = ["__version__", *_HOMES]

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ksub_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

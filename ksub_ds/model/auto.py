"""Tell transformers' Auto classes of our models, as soon as somebody imports those classes.

`import ksub_ds` must make `AutoModelForMaskedLM.from_pretrained(folder)` work, but must not itself
pay the seconds that transformers takes to import: `ksub --help` goes through it too.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
FAMILIES = ("Bert", "Electra", "DistilBert", "ModernBert")  # of families.py; each has the same three heads

# Our modules, each with the last class it defines: importing one imports transformers' Auto classes on the way.
_OURS = {
    "ksub_ds.model.configuration": "KSubRobertaConfig",
    "ksub_ds.model.base": "SubEmbeddingModel",
    "ksub_ds.model.masked_lm": "SubMaskedLM",
    "ksub_ds.model.modeling": "KSubRobertaForSequenceClassification",
    "ksub_ds.model.families": "KSubModernBertForSequenceClassification",
}


def _register_all() -> None:
    if any(name in sys.modules and not hasattr(sys.modules[name], last) for name, last in _OURS.items()):
        return  # half imported: its last line is `complete()`

    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    from ksub_ds.model import families, modeling

    for home, family in ((modeling, "Roberta"), *((families, name) for name in FAMILIES)):
        config = getattr(home, f"KSub{family}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for door, head in (
            (AutoModel, "Model"),
            (AutoModelForMaskedLM, "ForMaskedLM"),
            (AutoModelForSequenceClassification, "ForSequenceClassification"),
        ):
            door.register(config, getattr(home, f"KSub{family}{head}"), exist_ok=True)


def complete() -> None:
    """The last line of our modules: register if transformers' Auto classes were imported meanwhile."""
    if MODELS in sys.modules:
        _register_all()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers once the Auto classes are imported, at the end of the outermost import of a transformers module.

    Not before: transformers' modules import each other in circles, and ours need whole ones.
    """

    def __init__(self) -> None:
        self._running = threading.local()  # depth of nested transformers imports, for each thread

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            depth = getattr(self._running, "depth", 0)
            self._running.depth = depth + 1
            try:
                execute(module)
            finally:
                self._running.depth = depth
            if depth == 0 and (CONFIGURATIONS in sys.modules or MODELS in sys.modules) and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(MODELS)  # AutoConfig alone may have been imported: our models need it all
                _register_all()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now if the Auto classes are imported already, else when their time comes."""
    if MODELS in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _AfterImport())

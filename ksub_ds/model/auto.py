"""Tell transformers' Auto classes of our models, as soon as somebody imports those classes.

`import ksub_ds` must make `AutoModelForMaskedLM.from_pretrained(folder)` work, but must not itself
pay the seconds that transformers takes to import: `ksub --help` goes through it too.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
FAMILIES = ("Bert", "Electra", "DistilBert", "ModernBert")  # of families.py; each has the same three heads

# Our modules, each with the last name it defines: importing one imports transformers' Auto classes on the way.
_OURS = {
    "ksub_ds.model.configuration": "KSubRobertaConfig",
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


def _import_models() -> None:
    """AutoConfig alone was imported; our configuration cannot be before the Auto models are whole."""
    if MODELS not in sys.modules:
        importlib.import_module(MODELS)


_ACTIONS = {CONFIGURATIONS: _import_models, MODELS: _register_all}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs the action of a module right after that module is first imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _ACTIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            _ACTIONS[name]()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now if the Auto classes are imported already, else when their time comes."""
    if MODELS in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _AfterImport())

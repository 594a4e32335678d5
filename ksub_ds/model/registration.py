"""Our families and their classes by transformers' Auto class, and registration with these."""

import sys
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ksub_ds.model import causal_lm, families, roberta
from ksub_ds.model.base import SubEmbeddingModel

FAMILIES: tuple[type[SubEmbeddingModel], ...] = (  # our classes of the bare networks
    roberta.KSubRobertaModel,
    families.KSubBertModel,
    families.KSubElectraModel,
    families.KSubDistilBertModel,
    families.KSubModernBertModel,
    causal_lm.KSubLlamaModel,
    causal_lm.KSubMistralModel,
    causal_lm.KSubQwen3Model,
    causal_lm.KSubGemma3TextModel,
    causal_lm.KSubGPT2Model,
)
AUTO_CLASSES = (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM, *families.TASKS)


def family_of(model: SubEmbeddingModel) -> type[SubEmbeddingModel]:
    """Return our class of the bare network of a model's family."""
    return next(bare for bare in FAMILIES if bare.config_class is type(model).config_class)


def model_classes(bare: type[SubEmbeddingModel]) -> dict[Any, type[SubEmbeddingModel]]:
    """Return our classes of a family by transformers' Auto class: the bare network and the heads that it has.

    Args:
        bare: our class of the bare network.
    """
    module, family = vars(sys.modules[bare.__module__]), bare.__name__.removesuffix("Model")
    names = {auto: family + (auto.__name__.removeprefix("AutoModel") or "Model") for auto in AUTO_CLASSES}
    return {auto: module[name] for auto, name in names.items() if name in module}


def register() -> None:
    """Register our configurations and models with transformers' Auto classes; calling it again changes nothing."""
    for bare in FAMILIES:
        config_class = bare.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in model_classes(bare).items():
            auto_class.register(config_class, model_class, exist_ok=True)

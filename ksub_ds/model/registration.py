"""Registration of our models with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from ksub_ds.model import causal_lm, families, roberta

CLASSES = {
    AutoModel: (
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
    ),
    AutoModelForCausalLM: (
        causal_lm.KSubLlamaForCausalLM,
        causal_lm.KSubMistralForCausalLM,
        causal_lm.KSubQwen3ForCausalLM,
        causal_lm.KSubGemma3TextForCausalLM,
        causal_lm.KSubGPT2ForCausalLM,
    ),
    AutoModelForMaskedLM: (
        roberta.KSubRobertaForMaskedLM,
        families.KSubBertForMaskedLM,
        families.KSubElectraForMaskedLM,
        families.KSubDistilBertForMaskedLM,
        families.KSubModernBertForMaskedLM,
    ),
    AutoModelForSequenceClassification: (
        roberta.KSubRobertaForSequenceClassification,
        families.KSubBertForSequenceClassification,
        families.KSubElectraForSequenceClassification,
        families.KSubDistilBertForSequenceClassification,
        families.KSubModernBertForSequenceClassification,
    ),
}


def register() -> None:
    """Register our configurations and models with transformers' Auto classes; calling it again changes nothing."""
    for auto_class, model_classes in CLASSES.items():
        for model_class in model_classes:
            config_class = model_class.config_class
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            auto_class.register(config_class, model_class, exist_ok=True)

"""Registration of our models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from ksub_ds.model import families, roberta

CLASSES = {
    AutoModel: (
        roberta.KSubRobertaModel,
        families.KSubBertModel,
        families.KSubElectraModel,
        families.KSubDistilBertModel,
        families.KSubModernBertModel,
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

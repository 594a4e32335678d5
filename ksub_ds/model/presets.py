"""The networks of the presets, by name: Table 5 of the paper, and small ones for experiments."""

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from ksub_ds.codes.table import CodeTable
from ksub_ds.model.base import TokenPredictor
from ksub_ds.model.causal_lm import KSubLlamaConfig
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.families import KSubModernBertConfig
from ksub_ds.model.registration import register

# Layers, width, heads and inner width. With its gate Llama has three matrices where RoBERTa has two, so that two thirds
# of RoBERTa's inner width make as many parameters.
LLAMA_SIZES = {"llama_medium": (8, 512, 8, 1376), "llama_small": (6, 384, 6, 1024), "llama_tiny": (2, 128, 4, 344)}


def preset_config(preset: str, **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a preset (recipe.py lists them); pass the vocab_size of your codes."""
    if preset == "small_modernbert":
        return small_modernbert(**overrides)
    if preset in LLAMA_SIZES:
        return llama(preset, **overrides)
    return getattr(KSubRobertaConfig, preset)(**overrides)


def small_modernbert(**overrides: Any) -> KSubModernBertConfig:
    """Return ModernBERT in the size of `small` (6 layers, d = 384, 10.6M parameters in the layers).

    For little text and small machines: it uses its context after fewer steps than RoBERTa's (experiments/xnli), with
    rotary positions, the norm before each sublayer and a higher peak learning rate. Dropout is RoBERTa's, not
    ModernBERT's 0, for fine-tuning on little data; the classifier reads the mean of the states, since <s> learns
    nothing in pretraining.
    """
    share = 0.1
    fields: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1024,  # three matrices with the gate: as many parameters as RoBERTa's two of 1,536
        "max_position_embeddings": 512,
        "embedding_dropout": share,
        "attention_dropout": share,
        "mlp_dropout": share,
        "classifier_dropout": share,
        "classifier_pooling": "mean",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    fields |= overrides
    fields = {"cls_token_id": fields["bos_token_id"], "sep_token_id": fields["eos_token_id"]} | fields
    return KSubModernBertConfig(**fields)


def llama(preset: str, **overrides: Any) -> KSubLlamaConfig:
    """Return a Llama, as Llama 2: rotary positions, the norm before each sublayer, no bias and no dropout.

    Args:
        preset: one of LLAMA_SIZES.
        overrides: fields of the configuration.
    """
    layers, width, heads, inner = LLAMA_SIZES[preset]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return KSubLlamaConfig(**fields | overrides)


def fresh_model(config: PreTrainedConfig, table: CodeTable) -> TokenPredictor:
    """Build the masked or causal language model of one of our configurations, with random weights."""
    register()
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MASKED_LM_MAPPING)[kind](config, table)

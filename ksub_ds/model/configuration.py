"""KSubRobertaConfig: RoBERTa's configuration plus the sizes of the sub-embedding tables.

The presets are the paper's Table 5 and a `tiny` one for trials. Every field that shapes the
network is set here: transformers' own defaults differ from the published RoBERTa and XLM-R
(512 positions where 514 are needed, another epsilon, two token types).
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig


@strict
class KSubRobertaConfig(RobertaConfig):
    """Configuration of a RoBERTa or XLM-R encoder over sub-embeddings.

    Attributes:
        vocab_size: N, the number of coded tokens.
        table_sizes: M_1 .. M_K; set by the model from its code table.
        decoder_bias: whether the masked-token head has a bias per token, as RoBERTa's has.
        embedding_mixing: whether the embedding keeps a fixed d x d matrix beside its tables (a compressed model).
        num_dedicated: F, how many tokens have a row of their own beside the shared ones; set as table_sizes is.
    """

    model_type = "ksub_roberta"

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 514  # positions start at pad_token_id + 1 = 2
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    table_sizes: list[int] | tuple[int, ...] | None = None
    decoder_bias: bool = True
    embedding_mixing: bool = False
    num_dedicated = 0  # not a field: so it is saved only where there are some

    def validate_architecture(self) -> None:
        """Check the sizes; transformers calls this when a configuration is built.

        Raises:
            ValueError: the sizes do not fit each other.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}"
            )
        if self.table_sizes is not None and not 1 <= len(self.table_sizes) <= self.hidden_size:
            raise ValueError(f"table_sizes names {len(self.table_sizes)} tables for hidden_size {self.hidden_size}")

    @classmethod
    def _preset(cls, fields: dict[str, Any], overrides: dict[str, Any]) -> "KSubRobertaConfig":
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown configuration field {unknown[0]!r}")
        return cls(**fields | overrides)

    @classmethod
    def roberta_medium(cls, **overrides: Any) -> "KSubRobertaConfig":
        """Return RoBERTa-MEDIUM of the paper's Table 5: 8 layers, d = 512, vocabulary of roberta-base."""
        return cls._preset({"vocab_size": 50265}, overrides)

    @classmethod
    def xlmr_medium(cls, **overrides: Any) -> "KSubRobertaConfig":
        """Return XLM-R-MEDIUM of the paper's Table 5: 8 layers, d = 512, vocabulary of xlm-roberta-base."""
        return cls._preset({"vocab_size": 250002}, overrides)

    @classmethod
    def small(cls, **overrides: Any) -> "KSubRobertaConfig":
        """Return 6 layers, d = 384 (10.6M parameters outside the embedding): for experiments; pass your vocab_size."""
        fields = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
        }
        return cls._preset(fields, overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "KSubRobertaConfig":
        """Return 2 layers, d = 128: for trials and tests; pass the vocab_size of your codes."""
        fields = {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        }
        return cls._preset(fields, overrides)

"""How many tokens a model reads, and that the tokenizer beside it knows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ksub_ds.model.sequence_length import limit_tokenizer, longest_sequence


@pytest.mark.parametrize(
    ("model_type", "padding", "positions", "longest"),
    [("xlm-roberta", 1, 514, 512), ("camembert", 1, 40, 38), ("bert", 0, 40, 40), ("modernbert", 3, 40, 40)],
)
def test_the_longest_row_is_read_and_one_more_token_is_not(
    model_type: str, padding: int, positions: int, longest: int
) -> None:
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = AutoConfig.for_model(
        model_type, vocab_size=20, pad_token_id=padding, max_position_embeddings=positions, **small
    )
    assert longest_sequence(config) == longest
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        model(torch.full((1, longest), 5))
        if model_type != "modernbert":  # rotary positions go on
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, longest + 1), 5))


def test_a_tokenizer_keeps_a_shorter_limit_of_its_own(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    load_tokenizer(tiny_tokenizer).save(tmp_path)
    config = AutoConfig.for_model("roberta", pad_token_id=1, max_position_embeddings=34)
    limit_tokenizer(tmp_path, config)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 32
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 16}))
    limit_tokenizer(tmp_path, config)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 16
    limit_tokenizer(tmp_path / "nothing", config)  # a model without a tokenizer

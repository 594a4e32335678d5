"""`ksub analyze` of causal models, whose tokenizers have no mask token and often no padding: states layer by layer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

from ksub_ds.analysis.encoders import open_encoder
from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.sources import find_text


def causal_folder(folder: Path, text: Path, config: Any, **special: str) -> Path:
    """A causal model with random weights, and a byte-level tokenizer with these special tokens only."""
    trained = ByteLevelBPETokenizer()
    trained.train([str(path) for path in sorted(text.iterdir())], vocab_size=400, special_tokens=list(special.values()))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_str()), **special)
    wrapped.save_pretrained(folder)
    config.vocab_size = len(wrapped)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )


@pytest.fixture(scope="module")
def folders(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with a start token, and a GPT-2 with an end token alone."""
    made = tmp_path_factory.mktemp("causal")
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=48)
    return {
        "llama": causal_folder(made / "llama", tiny_text, llama(), bos_token="<s>", eos_token="</s>"),
        "gpt2": causal_folder(made / "gpt2", tiny_text, gpt2, eos_token="<|endoftext|>"),
    }


def test_numbers_equal_those_of_the_states(
    brute_force: Any, folders: dict[str, Path], tiny_text: Path, tmp_path: Path
) -> None:
    """transformers alone, document by document, then all pairs."""
    out = tmp_path / "out"
    models = [str(each) for each in folders.values()]
    fixed = ["--data", str(tiny_text), "--out", str(out), "--num-tokens", "120", "--languages", "en", "tr"]
    assert main(["analyze", *models, *fixed, "--points", "20", "--sequence-length", "40"]) == 0
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))["models"]
    for found, (name, folder) in zip(numbers, folders.items(), strict=True):
        model, wrapped = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        start = wrapped.eos_token_id if wrapped.bos_token_id is None else wrapped.bos_token_id
        types: list[int] = []
        parts = []
        for text in find_text(tiny_text, ("en", "tr")).values():
            left = 60
            for document in DocumentReader(text.sources, text.skipped):
                ids = wrapped(document, add_special_tokens=False)["input_ids"][: min(left, 38)]
                left -= len(ids)
                with torch.no_grad():
                    states = model(torch.tensor([[start, *ids]]), output_hidden_states=True).hidden_states
                parts.append(torch.stack(states)[:, 0, 1:])
                types += ids
                if not left:
                    break
        assert found["name"] == name and len(types) == found["layers"][0]["states"] == 120
        assert len(found["layers"]) == 3 and found["table_sizes"] == []
        for layer, own in zip(found["layers"], torch.cat(parts, dim=1).double().numpy(), strict=True):
            inter, intra = brute_force(np.array(types), own)
            assert layer["s_inter"] == pytest.approx(inter, abs=1e-5)
            assert layer["s_intra"] == pytest.approx(intra, abs=1e-5)


def test_what_cannot_be_analysed_is_named(tiny_text: Path, tmp_path: Path) -> None:
    bare = causal_folder(tmp_path / "bare", tiny_text, llama())
    with pytest.raises(UserError, match="has neither bos_token nor eos_token to begin a row with"):
        open_encoder(str(bare), "bare")
    T5Model(T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(UserError, match="is a t5 model; give an encoder such as BERT or XLM-R, or a causal model"):
        open_encoder(str(tmp_path / "t5"), "t5")
    XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)).save_pretrained(
        tmp_path / "xlnet"
    )
    with pytest.raises(UserError, match="is a xlnet model"):  # transformers counts it among the causal ones
        open_encoder(str(tmp_path / "xlnet"), "xlnet")

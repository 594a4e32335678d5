"""sentence-transformers opens what we write: an exported model, and a compressed sentence encoder as it stands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.cli import main
from ksub_ds.convert.export import export_run

SENTENCES = ["The bird sings near the river.", "A small house"]


@pytest.fixture(scope="module")
def library() -> Any:
    """sentence-transformers; six seconds to import, so not before a test wants it."""
    reason = "sentence-transformers 6 is not installed (pip install -e '.[interop]')"
    pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason=reason)
    return pytest.importorskip("sentence_transformers", reason=reason)


@pytest.fixture(scope="module")
def exported(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ksub export` of a masked language model with random weights."""
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    folder = tmp_path_factory.mktemp("sentences")
    KSubRobertaForMaskedLM(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    return export_run(folder / "model", folder / "exported")


def states(folder: Path) -> list[torch.Tensor]:
    """(tokens, d) last states of each sentence, by transformers alone, one sentence at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in SENTENCES]


def encoder(library: Any, folder: Path, pooling: str) -> Any:
    """A sentence encoder of a model folder: its states, and what is made of them."""
    modules = library.sentence_transformer.modules
    words = modules.Transformer(str(folder), max_seq_length=64)
    pool = modules.Pooling(words.get_embedding_dimension(), pooling_mode=pooling)
    return library.SentenceTransformer(modules=[words, pool], device="cpu")


def test_an_export_encodes_sentences(library: Any, exported: Path, tmp_path: Path) -> None:
    """The two together, so that the shorter one is padded; and again after sentence-transformers' own save."""
    model = encoder(library, exported, "mean")
    found = model.encode(SENTENCES, convert_to_tensor=True)
    means = torch.stack([each.mean(dim=0) for each in states(exported)])
    torch.testing.assert_close(found, means, rtol=1e-4, atol=1e-5)
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(SENTENCES, convert_to_tensor=True), found)


def test_a_compressed_sentence_encoder_is_one_still(library: Any, tiny_bpe: Path, tmp_path: Path) -> None:
    """Its vector is the first token's state, which no default of sentence-transformers would make it."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=80,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    encoder(library, tmp_path / "words", "cls").save(str(tmp_path / "plain"))
    command = ["compress", str(tmp_path / "plain"), "--num-tables", "2", "--table-size", "30"]
    assert main([*command, "--out", str(tmp_path / "small")]) == 0
    model = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert sum(each.numel() for each in model[0].auto_model.get_input_embeddings().parameters()) == 30 * 24
    found = model.encode(SENTENCES, convert_to_tensor=True)
    firsts = torch.stack([each[0] for each in states(tmp_path / "small")])
    torch.testing.assert_close(found, firsts, rtol=1e-4, atol=1e-5)

"""sentence-transformers opens what we write: an exported model, and a compressed sentence encoder as it stands."""

import json
import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def compressed(library: Any, tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ksub compress` of an encoder with a mean, a norm, a prompt that is the default, and a length of its own."""
    from transformers import BertConfig, BertModel

    folder, tokenizer = tmp_path_factory.mktemp("prompted"), AutoTokenizer.from_pretrained(tiny_bpe)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=80, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "words")
    tokenizer.save_pretrained(folder / "words")
    words, pool = encoder(library, folder / "words", "mean")
    norm = library.sentence_transformer.modules.Normalize()
    prompts = {"query": "a house ", "document": ""}
    plain = library.SentenceTransformer(modules=[words, pool, norm], prompts=prompts, default_prompt_name="query")
    plain.save(str(folder / "plain"))
    command = ["compress", str(folder / "plain"), "--num-tables", "2", "--table-size", "30"]
    assert main([*command, "--out", str(folder / "small")]) == 0
    return folder / "small"


OPEN = """
import json, sys
sys.modules["ksub_ds"] = None  # any import of it raises ImportError
from sentence_transformers import SentenceTransformer
found = []
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=folder.endswith("remote-code"))
    found.append([model.max_seq_length, model.prompts, model.encode(json.loads(sys.argv[1])).tolist()])
print("\\nfound " + json.dumps(found))
"""


@pytest.mark.timeout(300)
def test_every_form_of_an_export_encodes_the_same(library: Any, compressed: Path, tmp_path: Path) -> None:
    texts = [*SENTENCES, "the river " * 60]
    model = library.SentenceTransformer(str(compressed), device="cpu")
    vectors = model.encode(texts)
    assert model.max_seq_length == 64 and model.default_prompt_name == "query"
    assert (vectors**2).sum(axis=1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)
    assert abs(vectors - model.encode(texts, prompt="")).max() > 1e-3
    for form in ("ksub", "dense", "remote-code"):
        export_run(compressed, tmp_path / form, form=form)  # type: ignore[arg-type]
        card = (tmp_path / form / "README.md").read_text()
        assert 'SentenceTransformer("FOLDER"' in card and "pipeline_tag: sentence-similarity" in card
    again = library.SentenceTransformer(str(tmp_path / "ksub"), device="cpu").encode(texts)
    assert abs(again - vectors).max() < 1e-6
    folders = [str(tmp_path / form) for form in ("dense", "remote-code")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", OPEN, json.dumps(texts), *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for length, prompts, found in json.loads(done.stdout.split("\nfound ")[1]):
        assert length == 64 and prompts == model.prompts
        assert abs(torch.tensor(found) - torch.tensor(vectors)).max() < 1e-5


def test_it_learns_by_the_library_s_own_trainer(library: Any, compressed: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate (pip install -e '.[test]')")
    from datasets import Dataset

    model = library.SentenceTransformer(str(compressed), device="cpu")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    pairs = Dataset.from_dict({"anchor": SENTENCES * 2, "positive": SENTENCES[::-1] * 2})
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        warmup_steps=0, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    loss = library.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    library.SentenceTransformerTrainer(model, args=arguments, train_dataset=pairs, loss=loss).train()
    after = model.state_dict()
    tables = [name for name in after if ".tables." in name]
    assert len(tables) == 2 and not any(torch.equal(after[name], before[name]) for name in tables)
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(SENTENCES) - model.encode(SENTENCES)).max() < 1e-6

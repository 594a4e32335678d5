"""Shared by all tests: no network, the real data if it is there, a tiny tokenizer and tiny shards."""

import io
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .pretrain.runs import bench, bpe_shards, one_rank  # noqa: F401 - fixtures of several folders

# A shell starts background jobs with SIGINT ignored, and their children inherit it: those who test Ctrl-C would wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nine sorts of sentence a language are enough for a vocabulary and for documents that differ.
WORDS = {
    "en": "the a small old house river stone bird green walks sings falls under over near and but slowly today",
    "el": "το ένα μικρό παλιό σπίτι ποτάμι πέτρα πουλί πράσινο περπατά τραγουδά πέφτει κάτω πάνω κοντά και αλλά σήμερα",
    "tr": "bir küçük eski ev nehir taş kuş yeşil yürür öter düşer altında üstünde yakın ve ama yavaşça bugün",
}


def documents(language: str, count: int, seed: int = 0) -> list[str]:
    """`count` different texts of a few sentences."""
    draw = random.Random(f"{language} {seed}")
    words = WORDS[language].split()

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(4, 12))).capitalize() + "."

    return [f"{number}. " + " ".join(sentence() for _ in range(draw.randint(2, 8))) for number in range(count)]


@pytest.fixture(autouse=True)
def no_ranks_left() -> Iterator[None]:
    """Training in this process sets RANK, ...: commands that later tests start must not inherit them."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connecting anywhere but to this machine raises."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise OSError(f"a test tried to reach {address}; tests use no network")
        real(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]
    yield
    socket.socket.connect = real  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def ksub_data() -> Path:
    """The folder of real data (text/, tokenizer/, xnli/, ...) that KSUB_DATA names."""
    folder = os.environ.get("KSUB_DATA")
    if not folder:
        pytest.skip("KSUB_DATA is not set: this test needs the real data")
    if not Path(folder).is_dir():
        pytest.skip(f"KSUB_DATA={folder} is not a folder: this test needs the real data")
    return Path(folder)


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., list[str]]:
    """The function `documents`."""
    return documents


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of <lang>.jsonl, 3 languages of different size."""
    folder = tmp_path_factory.mktemp("text")
    for language, count in (("en", 300), ("el", 100), ("tr", 40)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents(language, count)]
        (folder / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece .model of a few hundred pieces in XLM-R's layout."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for language in WORDS for text in documents(language, 200, seed=1)),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_bpe(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small byte-level BPE tokenizer, of roberta-base's kind."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train([str(path) for path in sorted(tiny_text.iterdir())], vocab_size=500, special_tokens=special)
    folder = tmp_path_factory.mktemp("bpe")
    trained.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal_tokenizers(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small tokenizers with neither mask nor padding: GPT-2's kind, and Llama's of SentencePiece."""
    import sentencepiece
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    gpt2, llama = (tmp_path_factory.mktemp(name) for name in ("gpt2", "llama"))
    trained = ByteLevelBPETokenizer()
    files = [str(path) for path in sorted(tiny_text.iterdir())]
    trained.train(files, vocab_size=500, special_tokens=["<|endoftext|>"])
    trained.save_model(str(gpt2))
    GPT2TokenizerFast.from_pretrained(gpt2).save_pretrained(gpt2)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for language in WORDS for text in documents(language, 200, seed=1)),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (llama / "tokenizer.model").write_bytes(model.getvalue())
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | special
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    return {"gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="session")
def tiny_shards(tiny_text: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `tiny_text`: rows of 64 tokens, a few hundred of them, with a held-out part."""
    from ksub_ds.corpus.text.pipeline import ShardText, shard_text

    out = tmp_path_factory.mktemp("shards") / "tiny"
    shard_text(ShardText(tiny_text, tiny_tokenizer, out, sequence_length=64, validation_fraction=0.1, workers=1))
    return out


@pytest.fixture(scope="session")
def parallel_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of en-tr.jsonl and en-el.jsonl, 120 pairs each, in the two forms of a row."""
    folder = tmp_path_factory.mktemp("parallel")
    for one, two in (("en", "tr"), ("en", "el")):
        sides = [[text[:70] for text in documents(language, 120, seed=3)] for language in (one, two)]
        rows = [{one: a, two: b} for a, b in zip(*sides, strict=True)]
        lines = [json.dumps(row if two == "el" else {"translation": row}, ensure_ascii=False) for row in rows]
        (folder / f"{one}-{two}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pair_shards(
    tiny_text: Path, parallel_text: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_shards` with pairs: el+en and en+tr."""
    from ksub_ds.corpus.text.pipeline import ShardText, shard_text

    out = tmp_path_factory.mktemp("pairs") / "shards"
    form: dict[str, Any] = {"sequence_length": 64, "validation_fraction": 0.1, "workers": 1}
    shard_text(ShardText(tiny_text, tiny_tokenizer, out, parallel=parallel_text, **form))
    return out

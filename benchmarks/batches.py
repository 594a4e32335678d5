"""How fast text becomes batches, each as a ratio against HuggingFace's way in the same run.

    python benchmarks/batches.py [--shards SHARDS] [--json out.json]
    KSUB_DATA=DATA python benchmarks/batches.py      # also tokenises DATA/text with DATA/tokenizer

1. Masked batches of 32 x 512 from shards against transformers' DataCollatorForLanguageModeling on `datasets`
   (the fastest of its row formats). Target: 30 x.
2. Tokenising real text in 15 languages against `tokenizers`' batch encoding, the ids compared: with XLM-R's vocabulary
   (target: 12 x) and with a byte-level BPE of 50,000 pieces trained on the same text (target: 15 x).

One process and one thread on each side; both sides take turns, the best of each counts.
"""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import argparse
import gzip
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

from ksub_ds.common.files import write_json
from ksub_ds.corpus.batches import TrainingBatches
from ksub_ds.corpus.shards.dataset import MANIFEST, ShardDataset, dataset_fingerprint
from ksub_ds.corpus.shards.packing import Packer, Packing
from ksub_ds.corpus.shards.writer import ShardWriter
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

BATCH, LENGTH, VOCABULARY = 32, 512, 250_002
REPEATS = 5


def random_shards(folder: Path) -> None:
    """8,192 rows in three languages of an XLM-R-sized vocabulary; what the ids say does not matter here."""
    random = np.random.default_rng(0)
    packing = Packing(LENGTH, bos_id=0, eos_id=2, pad_id=1)
    languages = {}
    for language, tokens in (("en", 2_500_000), ("sw", 700_000), ("zh", 1_000_000)):
        writer = ShardWriter(folder / language, language, "train", LENGTH)
        packer = Packer(packing)
        writer.write(packer.add([random.integers(4, VOCABULARY - 1, tokens).astype(np.int32)]))
        writer.write(packer.finish())
        writer.close()
        languages[language] = {"files": writer.files}
    tokenizer = {"fingerprint": "", "vocab_size": VOCABULARY, "pad_id": 1, "mask_id": VOCABULARY - 1}
    tokenizer["special_ids"] = [0, 1, 2, 3, VOCABULARY - 1]
    manifest = {"format": 1, "sequence_length": LENGTH, "tokenizer": tokenizer, "languages": languages}
    write_json(folder / MANIFEST, {**manifest, "fingerprint": dataset_fingerprint(manifest)})


def xlmr_like(vocab_size: int) -> Any:
    """A HuggingFace tokenizer object with XLM-R's special ids; the collator asks it for no more."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"piece{i}" for i in range(4, vocab_size - 1)), "<mask>"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def measure_batches(shards: Path) -> dict[str, Any]:
    """Tokens a second of masked batches, ours and theirs."""
    from datasets import Dataset, concatenate_datasets
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    dataset = ShardDataset.open(shards)
    length = dataset.sequence_length
    ours = TrainingBatches(dataset, BATCH, alpha=1.0, seed=0, mlm_probability=0.15)
    steps = itertools.count()
    files = [str(path) for path in sorted(shards.glob("*/train-*.arrow"))]
    rows = concatenate_datasets([Dataset.from_file(path) for path in files])
    collator = DataCollatorForLanguageModeling(xlmr_like(dataset.manifest["tokenizer"]["vocab_size"]))

    def run_ours(count: int = 200) -> None:
        for _ in range(count):
            for array in ours.batch(next(steps), 0, BATCH).values():
                torch.from_numpy(array)

    def run_theirs(source: Any, count: int = 10) -> None:
        loader = DataLoader(source, batch_size=BATCH, shuffle=True, num_workers=0, collate_fn=collator)
        for _ in itertools.islice(loader, count):
            pass

    formats = {"python": rows, "numpy": rows.with_format("numpy"), "torch": rows.with_format("torch")}
    sides: dict[str, Callable[[], None]] = {"ours": run_ours}
    sides |= {name: lambda source=source: run_theirs(source) for name, source in formats.items()}  # type: ignore[misc]
    best = measuring.interleaved(sides, REPEATS)
    tokens = BATCH * length
    rates = {name: tokens * (200 if name == "ours" else 10) / seconds for name, seconds in best.items()}
    theirs = max(rates[name] for name in formats)
    return {
        "tokens_per_second": rates["ours"],
        "huggingface_tokens_per_second": theirs,
        "huggingface_by_row_format": {name: rates[name] for name in formats},
        "ratio": rates["ours"] / theirs,
        "target": 30,
    }


def real_texts(folder: Path, megabytes_per_language: float) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        left = megabytes_per_language * 1e6
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                left -= len(text.encode())
                if left < 0:
                    break
                yield text


def train_bpe(texts: list[str], folder: Path) -> None:
    """A byte-level BPE tokenizer of roberta-base's kind and size, as a folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(texts, vocab_size=50_265, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def measure_tokenising(path: Path, texts: list[str], target: float) -> dict[str, Any]:
    """Megabytes of text a second, ours and theirs, after comparing every id."""
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        theirs = Tokenizer.from_file(f"{folder}/tokenizer.json")
    size = sum(len(text.encode()) for text in texts)

    def run_ours() -> list[np.ndarray]:
        return [
            ids for first in range(0, len(texts), 512) for ids in tokenizer.encode_batch(texts[first : first + 512])
        ]

    def run_theirs() -> list[Any]:
        return theirs.encode_batch_fast(texts, add_special_tokens=False)

    tokens = 0  # comparing the ids is the warm-up too
    for mine, other in zip(run_ours(), run_theirs(), strict=True):
        assert mine.tolist() == other.ids, "the ids differ"
        tokens += len(mine)
    best = measuring.interleaved({"ours": run_ours, "theirs": run_theirs}, repeats=2)
    return {
        "megabytes": size / 1e6,
        "documents": len(texts),
        "tokens": tokens,
        "megabytes_per_second": size / 1e6 / best["ours"],
        "huggingface_megabytes_per_second": size / 1e6 / best["theirs"],
        "tokens_per_second": tokens / best["ours"],
        "ratio": best["theirs"] / best["ours"],
        "target": target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of masked batches and of tokenising.")
    parser.add_argument("--shards", type=Path, help="shards to read [random ones]")
    parser.add_argument("--megabytes-per-language", type=float, default=4.0, help="of real text to tokenise")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(measuring.machine(), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        if options.shards is None:
            random_shards(Path(folder))
        result = results["batches"] = measure_batches(options.shards or Path(folder))
    print(
        f"masked batches 32 x 512: {result['tokens_per_second'] / 1e6:.1f} Mtok/s, "
        f"HuggingFace {result['huggingface_tokens_per_second'] / 1e6:.2f}: {result['ratio']:.1f} x (target 30)"
    )
    if "KSUB_DATA" in os.environ:
        data = Path(os.environ["KSUB_DATA"])
        texts = list(real_texts(data / "text", options.megabytes_per_language))
        with tempfile.TemporaryDirectory() as folder:
            train_bpe(texts, Path(folder))
            for name, path, target in (
                ("tokenising", data / "tokenizer" / "sentencepiece.bpe.model", 12),
                ("tokenising_bpe", Path(folder), 15),
            ):
                result = results[name] = measure_tokenising(path, texts, target)
                print(
                    f"{name} {result['megabytes']:.0f} MB: {result['megabytes_per_second']:.1f} MB/s, tokenizers "
                    f"{result['huggingface_megabytes_per_second']:.2f}: {result['ratio']:.1f} x (target {target}), "
                    "same ids"
                )
    else:
        print("tokenising: skipped, KSUB_DATA is not set (it needs real text)")
    measuring.save(options.json, results)


if __name__ == "__main__":
    main()

"""A small SentencePiece vocabulary in XLM-R's layout, trained on a folder of `<lang>.jsonl.gz`.

    python experiments/demo/tokenizer.py --input demo/text --out demo/tokenizer/sentencepiece.bpe.model

XLM-R's layout is SentencePiece's default (<unk> <s> </s> first): the model id of a piece is its id plus one,
and <pad> and <mask> are added around it, so N is the number of pieces plus two.
"""

import argparse
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from ksub_ds.common.files import atomic_path


def texts(folder: Path, documents_per_language: int) -> Iterator[str]:
    """The first documents of every language, each followed by its words, one by one.

    SentencePiece takes as candidates only strings that are seen with more than one continuation. In a small
    corpus some words are always followed by a space; standing alone gives them a second one.
    """
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, documents_per_language):
                text = json.loads(line)["text"]
                yield text
                yield from text.split()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's SentencePiece vocabulary.")
    parser.add_argument("--input", type=Path, required=True, help="folder of <lang>.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--pieces", type=int, default=6000, help="upper limit; a small corpus gives fewer")
    parser.add_argument("--documents-per-language", type=int, default=400)
    options = parser.parse_args()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(options.input, options.documents_per_language),
        model_writer=model,
        model_type="unigram",
        vocab_size=options.pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentence_length=100_000,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    print(f"{pieces:,} pieces -> {options.out}")


if __name__ == "__main__":
    main()

"""Train a small SentencePiece vocabulary in XLM-R's layout on a folder of `<lang>.jsonl.gz`.

    python experiments/demo/tokenizer.py --input demo/text --out demo/tokenizer/sentencepiece.bpe.model

XLM-R's layout is SentencePiece's default (<unk> <s> </s> first): the model id of a piece is its id plus one,
and <pad> and <mask> are added around it, so N is the number of pieces plus two.

SentencePiece orders pieces by their score. Here they are ordered by the language that uses them most, frequent ones
first: the high digit of an id, and so the last of its positional codes, then identifies the language. Models with
meaningless codes learn too, but the few minutes of a demo are too short for that.
"""

import argparse
import gzip
import io
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time

from ksub_ds.common.files import atomic_path

NUM_CONTROL_PIECES = 3  # <unk> <s> </s>, always first


def texts(path: Path, documents_per_language: int) -> Iterator[str]:
    """Read the first documents of one language."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in itertools.islice(lines, documents_per_language):
            yield json.loads(line)["text"]


def training_sentences(folder: Path, documents_per_language: int) -> Iterator[str]:
    """Give the documents of every language, each followed by its words, one by one.

    SentencePiece considers only strings that it sees with more than one continuation. In a small corpus some words are
    always followed by a space; standing alone gives them a second continuation.
    """
    for path in sorted(folder.glob("*.jsonl.gz")):
        for text in texts(path, documents_per_language):
            yield text
            yield from text.split()


def train(folder: Path, pieces: int, documents_per_language: int) -> bytes:
    """Train a unigram model of at most `pieces` pieces, the same on every machine."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_sentences(folder, documents_per_language),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def order_by_language(model: bytes, folder: Path, documents_per_language: int) -> bytes:
    """Reorder the pieces by language and frequency; segmentation does not change."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    uses: dict[int, Counter[str]] = defaultdict(Counter)  # piece id -> language -> how often
    for path in sorted(folder.glob("*.jsonl.gz")):
        for ids in processor.encode(list(texts(path, documents_per_language))):
            for piece in ids:
                uses[piece][path.name] += 1

    def place(piece: int) -> tuple[str, int, int]:
        language, count = max(uses[piece].items(), key=lambda item: (item[1], item[0]), default=("~", 0))
        return language, -count, piece

    proto = ModelProto.FromString(model)
    pieces = list(proto.pieces)
    del proto.pieces[NUM_CONTROL_PIECES:]
    order = sorted(range(NUM_CONTROL_PIECES, len(pieces)), key=place)
    proto.pieces.extend(pieces[piece] for piece in order)
    return proto.SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's SentencePiece vocabulary.")
    parser.add_argument("--input", type=Path, required=True, help="folder of <lang>.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--pieces", type=int, default=6000, help="upper limit; a small corpus gives fewer")
    parser.add_argument("--documents-per-language", type=int, default=400)
    options = parser.parse_args()
    model = train(options.input, options.pieces, options.documents_per_language)
    ordered = order_by_language(model, options.input, options.documents_per_language)
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(ordered)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=ordered).get_piece_size()
    print(f"{pieces:,} pieces -> {options.out}")


if __name__ == "__main__":
    main()

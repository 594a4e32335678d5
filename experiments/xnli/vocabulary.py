"""Cut a SentencePiece vocabulary to the pieces that a text uses most.

    python experiments/xnli/vocabulary.py --tokenizer xlmr.model --text text --languages en sw --out small.model

Words that lose their piece are spelled with shorter pieces, in the end with characters; so a one-character piece counts
as often as its character occurs in the text, whatever piece it is in now. The result is a model in XLM-R's layout.
"""

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import atomic_path

NUM_CONTROL_PIECES = 3  # <unk> <s> </s>, always first
BATCH = 500


def batches(files: Sequence[Path]) -> Iterator[list[str]]:
    """Read the documents of JSON-lines files in batches."""
    for path in files:
        batch = []
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                batch.append(json.loads(line)["text"])
                if len(batch) == BATCH:
                    yield batch
                    batch = []
        yield batch


def cut(model: bytes, files: Sequence[Path], pieces: int) -> bytes:
    """Keep the `pieces` most used pieces of a model (control pieces included), in their old order."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    uses: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    for batch in batches(files):
        for ids, text in zip(processor.encode(batch, num_threads=1), batch, strict=True):
            uses.update(ids)
            characters.update(text)
    proto = ModelProto.FromString(model)
    every = list(proto.pieces)

    def count(index: int) -> int:
        return max(uses[index], characters[every[index].piece])

    ordinary = sorted(range(NUM_CONTROL_PIECES, len(every)), key=lambda index: (-count(index), index))
    kept = sorted(ordinary[: pieces - NUM_CONTROL_PIECES])
    del proto.pieces[NUM_CONTROL_PIECES:]
    proto.pieces.extend(every[index] for index in kept)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def main() -> None:
    """Parse the options and write the smaller model."""
    parser = argparse.ArgumentParser(description="Cut a SentencePiece vocabulary to the pieces a text uses most.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the .model file to cut")
    parser.add_argument("--text", type=Path, required=True, help="folder of <lang>.jsonl.gz")
    parser.add_argument("--languages", nargs="+", required=True, help="whose text counts")
    parser.add_argument("--pieces", type=int, default=32_000)
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    options = parser.parse_args()
    files = [options.text / f"{language}.jsonl.gz" for language in options.languages]
    for option, path in (("tokenizer", options.tokenizer), *(("text", file) for file in files)):
        if not path.is_file():
            raise UserError(f"--{option}: {path} is not there, or no file")
    small = cut(options.tokenizer.read_bytes(), files, options.pieces)
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(small)
    print(f"{sentencepiece.SentencePieceProcessor(model_proto=small).get_piece_size():,} pieces -> {options.out}")


if __name__ == "__main__":
    sys.exit(run_main(main))

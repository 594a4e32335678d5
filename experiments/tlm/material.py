"""The text of the experiment: MultiNLI's training sentences, one by one and with their translations, as token shards.

Both kinds of rows say the same: every sentence of `<lang>/train.jsonl.gz` is a document of its language, and a side of
a pair with English. English is in every pair, so that its documents are repeated once for each other language: a
language has the same share of the tokens in both kinds.

The vocabulary is cut to the pieces that these sentences use most. XNLI's validation and test sets are not opened.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.xnli.vocabulary import cut
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.corpus.text.pipeline import ShardText, shard_text

SIDES = ("premise", "hypothesis")
ENGLISH = "en"


def make_shards(
    xnli: Path, languages: Sequence[str], tokenizer: Path, pieces: int, sequence_length: int, out: Path
) -> Path:
    """Make shards of single sentences and of pairs, unless they are there.

    Args:
        xnli: folder of `<lang>/train.jsonl.gz`, parallel by row.
        languages: beside English.
        tokenizer: XLM-R's SentencePiece model.
        pieces: of it that are kept.
        sequence_length: tokens of a row.
        out: folder for text, vocabulary and shards.

    Returns:
        The folder of the shards.

    Raises:
        UserError: files are missing, or not parallel.
    """
    shards, small = out / "shards", out / "vocabulary.model"
    if (shards / "manifest.json").exists():
        return shards
    english = sentences(xnli, ENGLISH)
    for language in languages:
        theirs = sentences(xnli, language)
        if len(theirs) != len(english):
            raise UserError(
                f"{xnli}: {language} has {len(theirs) // 2:,} training rows and {ENGLISH} {len(english) // 2:,}; "
                "they must be translations of each other, row by row"
            )
        _write(out / "text" / f"{language}.jsonl.gz", ({"text": each} for each in theirs))
        sides = zip(english, theirs, strict=True)
        _write(
            out / "pairs" / f"{ENGLISH}-{language}.jsonl.gz", ({ENGLISH: ours, language: each} for ours, each in sides)
        )
    _write(out / "text" / f"{ENGLISH}.jsonl.gz", ({"text": each} for _ in languages for each in english))
    files = [out / "text" / f"{each}.jsonl.gz" for each in (ENGLISH, *languages)]
    if not tokenizer.is_file():
        raise UserError(f"--tokenizer: {tokenizer} is not there, or no file")
    with atomic_path(small) as temporary:
        temporary.write_bytes(cut(tokenizer.read_bytes(), files, pieces))
    shard_text(
        ShardText(
            input=out / "text",
            parallel=out / "pairs",
            tokenizer=small,
            out=shards,
            sequence_length=sequence_length,
            validation_fraction=0.02,
            workers=1,
        )
    )
    return shards


def sentences(xnli: Path, language: str) -> list[str]:
    """Read the premises and hypotheses of a training set, row by row.

    Raises:
        UserError: there is none.
    """
    path = xnli / language / "train.jsonl.gz"
    if not path.is_file():
        raise UserError(f"--data: {path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [row[side] for row in map(json.loads, lines) for side in SIDES]


def _write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8", compresslevel=1) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

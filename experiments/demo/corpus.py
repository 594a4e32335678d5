"""Write a small deterministic corpus in the 15 XNLI languages, so that the demo needs no download.

    python experiments/demo/corpus.py --out demo/text [--bytes-per-language 400000] [--seed 0]

Words and sentence templates are in lexicon/<lang>.txt. A document keeps to one trade, place and time of day (who does
what, where, when), then turns to a few things and their qualities, or to small sums, so that a masked word can be
guessed from its context. Every draw is keyed by language and document number: the files are the same, byte for byte, on
every machine.
"""

import argparse
import gzip
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.files import atomic_path

LEXICON_FOLDER = Path(__file__).parent / "lexicon"
LANGUAGES = tuple(sorted(path.stem for path in LEXICON_FOLDER.glob("*.txt")))
WRITTEN_WITHOUT_SPACES = {"zh"}
TURKISH_CAPITALS = {"i": "İ", "ı": "I"}
SENTENCE_START = re.compile(r"(?:^|(?<=[.?;] ))([¿]?)(\w)")


@dataclass(frozen=True)
class Lexicon:
    """The words and templates of one language, as lexicon/<lang>.txt has them."""

    language: str
    statements: list[str]
    questions: list[str]
    qualities: list[str]
    sums: list[str]
    numbers: list[str]
    times: list[str]
    topics: list[tuple[str, str, list[str], list[str]]]  # subject, verb, objects, places
    things: list[tuple[str, list[str]]]  # noun, adjectives that agree with it


def read_lexicon(path: Path) -> Lexicon:
    """Read `[section]` headings and the lines below them; `|` separates fields, `,` alternatives."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line:
            lines.append(line)
    topics = []
    for line in sections["topics"]:
        subject, verb, objects, places = line.split(" | ")
        topics.append((subject, verb, objects.split(", "), places.split(", ")))
    things = []
    for line in sections["things"]:
        noun, adjectives = line.split(" | ")
        things.append((noun, adjectives.split(", ")))
    return Lexicon(
        language=path.stem,
        statements=sections["statements"],
        questions=sections["questions"],
        qualities=sections["qualities"],
        sums=sections["sums"],
        numbers=sections["numbers"][0].split(", "),
        times=sections["times"][0].split(", "),
        topics=topics,
        things=things,
    )


def capitalise(text: str, language: str) -> str:
    """Capitalise the start of each sentence; scripts without capitals do not change."""

    def upper(match: re.Match[str]) -> str:
        capital = TURKISH_CAPITALS.get(match[2]) if language == "tr" else None
        return match[1] + (capital or match[2].upper())

    return SENTENCE_START.sub(upper, text)


def build_document(lexicon: Lexicon, draw: random.Random) -> str:
    """Compose one document: up to six sentences on one trade, then two to four qualities or sums."""
    subject, verb, objects, places = draw.choice(lexicon.topics)
    time, place = draw.choice(lexicon.times), draw.choice(places)
    sentences = []
    for _ in range(draw.randint(3, 6)):
        template = draw.choice(lexicon.statements if draw.random() < 0.75 else lexicon.questions)
        sentences.append(template.format(S=subject, V=verb, O=draw.choice(objects), P=place, T=time))
    for _ in range(draw.randint(2, 4)):
        if draw.random() < 0.6:
            noun, adjectives = draw.choice(lexicon.things)
            first, second = draw.sample(adjectives, 2)
            sentences.append(draw.choice(lexicon.qualities).format(N=noun, A=first, B=second))
        else:
            a = draw.randint(1, 9)
            b = draw.randint(1, 10 - a)
            one, other, total = (lexicon.numbers[n - 1] for n in (a, b, a + b))
            sentences.append(draw.choice(lexicon.sums).format(a=one, b=other, c=total))
    separator = "" if lexicon.language in WRITTEN_WITHOUT_SPACES else " "
    return capitalise(separator.join(dict.fromkeys(sentences)), lexicon.language)  # no sentence twice


def write_corpus(folder: Path, bytes_per_language: int, seed: int) -> dict[str, int]:
    """Write `<lang>.jsonl.gz` for every language; return the number of documents of each."""
    documents = {}
    for language in LANGUAGES:
        lexicon = read_lexicon(LEXICON_FOLDER / f"{language}.txt")
        lines: list[str] = []
        size = 0
        while size < bytes_per_language:
            text = build_document(lexicon, random.Random(f"{seed}/{language}/{len(lines)}"))
            row = {"id": f"{language}-{len(lines)}", "source": "demo", "text": text}
            lines.append(json.dumps(row, ensure_ascii=False))
            size += len(text.encode())
        with atomic_path(folder / f"{language}.jsonl.gz") as temporary:
            temporary.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
        documents[language] = len(lines)
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's 15-language corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder for <lang>.jsonl.gz")
    parser.add_argument("--bytes-per-language", type=int, default=400_000, help="of UTF-8 text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    documents = write_corpus(options.out, options.bytes_per_language, options.seed)
    print(f"{sum(documents.values()):,} documents in {len(documents)} languages -> {options.out}")


if __name__ == "__main__":
    main()

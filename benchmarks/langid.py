"""Quality and speed of language identification on labelled WET files.

    KSUB_DATA=DATA python benchmarks/langid.py [--json out.json]      # DATA/wet, DATA/text, DATA/langid

Precision, recall and F1 of each of the 15 languages, how many pages of other languages are dropped, and pages per
second on one core, for
1. py3langid on windows of the page, the default. Targets: macro F1 0.98, 97 % of the others dropped, 2,000 pages/s.
2. fastText's lid.176 on the whole page at threshold 0.5, CCNet's way, if DATA/langid holds the model.
3. lingua (low accuracy mode, all its languages) on the same windows, on every tenth page, if it is installed
   (pip install lingua-language-detector): the alternative that needs no download either.

The windows and the threshold were chosen on the first three files (sorted by name); the numbers are for the others.

A page counts as one in two languages when most of its characters are in paragraphs that DATA/text has under the source
`mdn_retired`. Those are technical pages translated in part, about half English; their label names the language of the
translation. They are counted separately, since neither language is wrong: the page is kept as either, and the score
says how much of the page that is.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

import argparse
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring

from ksub_ds.common.languages import LANGUAGES
from ksub_ds.corpus.commoncrawl.langid import OTHER, LanguageIdentifier, cut_windows, load_identifier
from ksub_ds.corpus.commoncrawl.wet import Page, read_wet

TUNED_ON = 3  # files
BILINGUAL = "mdn_retired"
REPEATS = 3


class Labelled(NamedTuple):
    """A page with the language its label names ("other" for none of the 15), and whether it is in two."""

    text: str
    label: str
    bilingual: bool


def read_pages(data: Path) -> list[Labelled]:
    """Return the labelled pages of the files that were not used for tuning."""
    bilingual: set[str] = set()
    for path in sorted((data / "text").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for document in map(json.loads, stream):
                if document["source"] == BILINGUAL:
                    bilingual.update(paragraph.strip() for paragraph in document["text"].split("\n"))
    truth = {}
    for line in (data / "wet/truth.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        truth[entry["url"]] = entry["language"] if entry["language"] in LANGUAGES else OTHER
    pages = []
    for path in sorted((data / "wet").glob("*.wet.gz"))[TUNED_ON:]:
        for page in read_wet(path):
            if isinstance(page, Page):
                lines = [line.strip() for line in page.text.split("\n")]
                shared = sum(len(line) for line in lines if line in bilingual)
                pages.append(Labelled(page.text, truth[page.url], 2 * shared > sum(map(len, lines))))
    return pages


class Lingua:
    """lingua on the windows of WindowIdentifier."""

    def __init__(self) -> None:
        lingua: Any = importlib.import_module("lingua")
        builder = lingua.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode()
        self._detector = builder.with_preloaded_language_models().build()
        self.fingerprint = importlib.metadata.version("lingua-language-detector")

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Identify the language of each text, see LanguageIdentifier."""
        answers = []
        for text in texts:
            best = self._detector.compute_language_confidence_values(b" ".join(cut_windows(text)).decode())[0]
            name = best.language.iso_code_639_1.name.lower()
            answers.append((name if name in LANGUAGES and best.value >= 0.5 else OTHER, best.value))
        return answers


def quality(pages: list[Labelled], found: list[str]) -> dict[str, Any]:
    """Return precision, recall and F1 by language, their macro mean, and the share of other languages dropped."""
    pairs = Counter((page.label, name) for page, name in zip(pages, found, strict=True))
    languages = {}
    for language in LANGUAGES:
        right = pairs[language, language]
        labelled = sum(count for (label, _), count in pairs.items() if label == language)
        named = sum(count for (_, name), count in pairs.items() if name == language)
        languages[language] = {
            "pages": labelled,
            "precision": right / named if named else 0.0,
            "recall": right / labelled if labelled else 0.0,
            "f1": 2 * right / (labelled + named) if labelled + named else 0.0,
        }
    others = sum(count for (label, _), count in pairs.items() if label == OTHER)
    return {
        "macro_f1": sum(entry["f1"] for entry in languages.values()) / len(languages),
        "others": others,
        "others_dropped": pairs[OTHER, OTHER] / others if others else 1.0,
        "languages": languages,
        "mistaken": {f"{label} for {name}": n for (label, name), n in pairs.most_common() if label != name},
    }


def measure(identifier: LanguageIdentifier, pages: list[Labelled]) -> dict[str, Any]:
    """Return the quality on pages in one language, the answers for those in two, and the best speed of REPEATS runs."""
    texts = [page.text for page in pages]
    seconds = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        answers = identifier.identify(texts)
        seconds = min(seconds, time.perf_counter() - start)
    found = [name for name, _ in answers]
    single = [index for index, page in enumerate(pages) if not page.bilingual]
    both = [(page.label, name) for page, name in zip(pages, found, strict=True) if page.bilingual]
    return {
        **quality([pages[index] for index in single], [found[index] for index in single]),
        "pages": len(single),
        "pages_per_second": len(pages) / seconds,
        "bilingual": {
            "pages": len(both),
            "named as labelled": sum(name == label for label, name in both),
            "named English": sum(name == "en" != label for label, name in both),
            "dropped": sum(name == OTHER for _, name in both),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("KSUB_DATA"), help="folder with wet/ and text/")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: KSUB_DATA is not set; this benchmark needs labelled WET files")
        return
    pages = read_pages(options.data)
    candidates: dict[str, tuple[LanguageIdentifier, list[Labelled]]] = {"py3langid": (load_identifier(), pages)}
    model = options.data / "langid/lid.176.ftz"
    if model.is_file() and importlib.util.find_spec("fasttext"):
        candidates["fasttext"] = load_identifier("fasttext", model), pages
    if importlib.util.find_spec("lingua"):
        candidates["lingua"] = Lingua(), pages[::10]
    result = {name: measure(*candidate) for name, candidate in candidates.items()}

    print(f"{len(pages):,} pages of files {TUNED_ON} and on; {sum(page.bilingual for page in pages)} in two languages")
    rows = [
        [language]
        + [f"{entry['languages'][language][key]:.3f}" for entry in result.values() for key in ("precision", "recall")]
        for language in LANGUAGES
    ]
    header = ["", *(f"{name} {key}" for name in result for key in ("precision", "recall"))]
    measuring.print_table("Pages in one language", header, rows)
    rows = [
        [
            name,
            f"{entry['macro_f1']:.4f}",
            f"{entry['others_dropped']:.1%} of {entry['others']}",
            f"{entry['pages_per_second']:,.0f}",
            ", ".join(f"{count} {what}" for what, count in entry["bilingual"].items()),
        ]
        for name, entry in result.items()
    ]
    measuring.print_table("All in all", ["", "macro F1", "others dropped", "pages/s/core", "in two languages"], rows)
    ours = result["py3langid"]
    print("\nmacro F1:", measuring.verdict(ours["macro_f1"], 0.98))
    print("others dropped:", measuring.verdict(ours["others_dropped"], 0.97))
    print("pages/s/core:", measuring.verdict(ours["pages_per_second"], 2000))
    measuring.save(options.json, {"identifiers": result})
    sys.stdout.flush()


if __name__ == "__main__":
    main()

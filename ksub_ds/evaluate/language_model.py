"""Bits per byte of text, language by language, under any causal language model.

    ksub evaluate lm --model model gpt2 --data text --out lm

One job a language. The same documents are scored for every model, in windows of as many tokens: evaluate/lm/ says how
both are chosen. After every few documents the sums are saved, and a language left half done goes on from there.

    bits per byte = nats of all predicted tokens / (ln 2 * UTF-8 bytes of their text)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, sha256_bytes, write_json
from ksub_ds.common.languages import language_name
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.common.option_help import Section
from ksub_ds.corpus.shards.dataset import is_shards
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.skipped import LeftOut, Skipped
from ksub_ds.corpus.text.sources import LanguageText, find_text
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.finetune.classifier import describe, tokenizer_source
from ksub_ds.evaluate.finetune.scoring import TOKENS_ON_CPU, TOKENS_ON_GPU, scoring_batches
from ksub_ds.evaluate.lm.documents import Choice, choose
from ksub_ds.evaluate.lm.tokens import CausalTokenizer, windows
from ksub_ds.evaluate.queue.queue import Job, Queue
from ksub_ds.evaluate.queue.worker import Plan
from ksub_ds.evaluate.settings import folders_of
from ksub_ds.model.sequence_length import longest_sequence

if TYPE_CHECKING:  # seconds of imports that --help does without
    from ksub_ds.evaluate.lm.causal import CausalScorer

BLOCK_CHARACTERS = 1 << 17  # of text that is scored between two saved states
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings:
    """Score text under causal language models: bits per byte of each language.

    The same documents and windows for every model. The same command again continues, or helps as one more worker.
    """

    model: tuple[str, ...]
    """Model folders (of `ksub export`, or any causal HuggingFace model), or names such as gpt2. Several are evaluated
    side by side, each in a folder of --out that has its name."""
    data: Path
    """Folder of text that no model has seen: <lang>.jsonl, .txt, .parquet (compressed or not) or <lang>/."""
    out: Path
    """Folder for results, shared by all workers."""
    tokenizer: str | None = None
    """Tokenizer folder, or SentencePiece .model, for all models. [each model's own]"""
    languages: Annotated[tuple[str, ...], Section("text")] = ()
    """Which languages of --data. [all]"""
    splits: tuple[Literal["train", "validation", "test"], ...] | None = None
    """Take files of these splits only, by names such as en.test.jsonl; other names say train. [all files]"""
    held_out: float | None = None
    """Only the documents that preprocessing/shard_text.py keeps out of training with this --validation-fraction, where
    --data is the text that a model was trained on. [all]"""
    bytes_per_language: int = 1_000_000
    """The most UTF-8 bytes of a language, in documents drawn by --seed; the last one is cut. 0 = all there are."""
    max_documents: int | None = None
    """The most documents of a language. [as many as make --bytes-per-language]"""
    seed: int = 0
    """Of the choice of documents."""
    text_column: str | None = None
    """Key or column of --data that holds the text. ["text", else "raw_content"]"""
    line_documents: bool = False
    """Each line of a .txt is a document. [blank lines separate documents]"""
    window: Annotated[int, Section("scoring")] = 512
    """The most tokens that a model reads at a time, the one that starts a document included."""
    context: int = 256
    """The fewest tokens that are read before one that is scored, where its document has so many."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the network; its head and the loss are fp32. [bf16 on a GPU, fp32 on a CPU]"""

    def checked(self) -> Self:
        """Return these settings, with the precision filled in.

        Raises:
            UserError: an impossible value.
        """
        if not self.model:
            raise UserError("--model: give at least one model")
        least = {"bytes_per_language": 0, "max_documents": 1, "seed": 0, "window": 2, "context": 1}
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise UserError(f"--{key.replace('_', '-')} {value}: must be at least {smallest}")
        if self.context > self.window:
            raise UserError(f"--context {self.context}: must be at most --window ({self.window})")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: must lie between 0 and 1, as --validation-fraction did")
        for language in self.languages:
            if language_name(language) is None:
                raise UserError(f"--languages {language}: is not a language code such as en or zh-Hant")
        if is_shards(self.data):
            raise UserError(f"--data {self.data}: holds token shards; give the folder of the text they were made from")
        precision = self.precision or ("bf16" if distributed.has_gpu() else "fp32")
        return dataclasses.replace(self, precision=precision)

    def layout(self) -> TextLayout:
        """Return how documents lie in the files."""
        return TextLayout(self.text_column, self.line_documents)

    def choice(self) -> Choice:
        """Return how documents are chosen."""
        return Choice(self.seed, self.bytes_per_language or None, self.max_documents, self.held_out)

    def identity(self) -> dict[str, Any]:
        """Return what decides the scores, besides model, tokenizer and text, as JSON values."""
        return {
            **asdict(self.choice()),
            **self.layout().recipe(),
            "window": self.window,
            "context": self.context,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class LanguageJob(Job):
    """Score the text of one language."""

    language: str


@dataclass
class LanguageScores:
    """What is known of the documents of a language that have been scored.

    Attributes:
        stamp: of the evaluation that they belong to.
        nats: negative log-likelihood of each document.
        num_bytes: of each document: those that its predicted tokens stand for.
        tokens: predicted in all.
        unknown: how many tokens are the unknown one.
        not_restored: how many documents their tokens do not decode to.
    """

    stamp: str
    nats: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    tokens: int = 0
    unknown: int = 0
    not_restored: int = 0


class LanguageModelPlan(Plan):
    """The queue of one model's evaluation: a job a language.

    Args:
        settings: checked.
        model: one of settings.model.
        folder: where its results go.
        text: of each language.

    Raises:
        UserError: the model or its tokenizer cannot be used; other settings are in the folder.
    """

    kind: ClassVar[str] = "lm"

    def __init__(self, settings: LanguageModelSettings, model: str, folder: Path, text: dict[str, LanguageText]):
        from ksub_ds.evaluate.lm.causal import check_causal

        assert settings.precision is not None, "settings.checked() fills it in"
        self.settings, self.model, self.folder, self._text = settings, model, folder, text
        self.precision = settings.precision
        config = check_causal(model)
        longest = longest_sequence(config.get_text_config())
        if longest is not None and settings.window > longest:
            raise UserError(
                f"--window {settings.window}: {model} has positions for {longest} tokens; give that or less"
            )
        self.tokenizer = CausalTokenizer(tokenizer_source(model, settings.tokenizer))
        vocabulary = int(config.get_text_config().vocab_size)
        if self.tokenizer.vocab_size > vocabulary:
            raise UserError(
                f"--tokenizer: has {self.tokenizer.vocab_size:,} tokens, but {model} only {vocabulary:,}; give the "
                "model's own"
            )
        self.about = describe(model)
        self.data = {language: each.fingerprint() for language, each in text.items()}
        identity = {
            "kind": self.kind,
            "settings": settings.identity(),
            "model": self.about["fingerprint"],
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.data,
        }
        self.stamp = sha256_bytes(repr(identity).encode())
        self._scorer: CausalScorer | None = None
        jobs = [LanguageJob(language, (), language, language) for language in text]
        self.queue = Queue.join(folder, jobs, identity)

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Score languages."""
        return [self._score(job.language, check_lease) for job in jobs if isinstance(job, LanguageJob)]

    def forget(self, job: Job) -> None:
        """Remove the state of a language whose result is published."""
        (self.queue.work(job.name) / STATE).unlink(missing_ok=True)

    def _score(self, language: str, check_lease: Callable[[], None]) -> dict[str, Any]:
        """Score a language from where its last worker left it.

        Raises:
            UserError: the model gives no number.
        """
        path = self.queue.work(language) / STATE
        text = LanguageText(self._text[language].sources, Skipped())
        chosen = choose(text, self.settings.layout(), self.settings.choice())
        if text.skipped.total():
            get_logger().info(f"{language}: skipped documents or files: {', '.join(text.skipped.lines())}")
        scores = self._saved(path)
        before = len(scores.nats)
        sizes = [len(document.encode()) for document in chosen.texts]
        with Progress(sum(sizes) // 1000, "kB of text", f"scoring {language}", sum(sizes[:before]) // 1000) as progress:
            for block in _blocks(chosen.texts, before):
                self._add(block, scores, check_lease)
                if not math.isfinite(sum(scores.nats)):
                    raise UserError(f"--model {self.model}: gives no finite probability to {language}: it has diverged")
                write_json(path, asdict(scores))
                progress.advance(sum(sizes[: len(scores.nats)]) // 1000 - progress.done)
        return {
            **asdict(scores),
            "available": chosen.available,
            "cut": chosen.cut,
            "skipped": dict(text.skipped.counts),
        }

    def _saved(self, path: Path) -> LanguageScores:
        """Return what an earlier worker has saved of a language; nothing where it is of another evaluation."""
        fresh = LanguageScores(self.stamp)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            return fresh
        try:
            saved = LanguageScores(**read_json(path))
        except (UserError, TypeError):
            return fresh
        return saved if saved.stamp == self.stamp else fresh

    def _add(self, texts: list[str], scores: LanguageScores, check_lease: Callable[[], None]) -> None:
        """Score some documents."""
        from ksub_ds.evaluate.lm.causal import CausalScorer

        if self._scorer is None:
            self._scorer = CausalScorer(self.model, self.precision, distributed.device())
        settings, tokens = self.settings, self.tokenizer.encode(texts)
        documents = [each.ids for each in tokens]
        parts = [
            (number, part)
            for number, ids in enumerate(documents)
            for part in windows(len(ids), settings.window, settings.context)
        ]
        at_once = TOKENS_ON_GPU if distributed.has_gpu() else TOKENS_ON_CPU
        found = np.zeros(len(parts))
        for batch in scoring_batches(np.array([part.length for _, part in parts], dtype=np.int64), at_once):
            found[batch] = self._scorer.nats(documents, [parts[index] for index in batch])
            check_lease()
        nats = np.zeros(len(documents))
        np.add.at(nats, [number for number, _ in parts], found)
        scores.nats += nats.tolist()
        scores.num_bytes += [each.num_bytes for each in tokens]
        scores.tokens += sum(max(0, len(ids) - 1) for ids in documents)
        scores.unknown += sum(each.unknown for each in tokens)
        scores.not_restored += sum(not each.restored for each in tokens)

    def finish(self) -> None:
        """Write results.json, documents.json and table.md.

        Raises:
            UserError: no language has a readable document with a token.
        """
        self._scorer = None
        stored = {language: self.queue.result(language) for language in self._text}
        scores = {
            language: _summary(result)
            for language, result in stored.items()
            if sum(result["num_bytes"]) and result["tokens"]  # some tokenizers drop characters
        }
        if not scores:
            raise UserError(
                f"--data {self.settings.data}: no readable document with a token in any language (see the counts above)"
            )
        results = {
            "task": self.kind,
            "setting": self.kind,
            "languages": scores,
            "missing": sorted(self._text.keys() - scores.keys()),
            "average": float(np.mean([each["bits_per_byte"] for each in scores.values()])),
            "model": self.about,
            "tokenizer": {
                "path": self.settings.tokenizer or self.model,
                "fingerprint": self.tokenizer.fingerprint,
                "start": self.tokenizer.start_token,
            },
            "data": {"path": str(self.settings.data), "languages": self.data},
            "settings": self.settings.identity(),
        }
        documents = {
            language: {"nats": stored[language]["nats"], "bytes": stored[language]["num_bytes"]} for language in scores
        }
        write_json(self.folder / "documents.json", documents)
        result_tables.write_text(self.folder / "table.md", result_tables.lm_table([results], "markdown"))
        write_json(self.folder / "results.json", results)

    def summary(self) -> str:
        """Return what the command prints at the end."""
        return (self.folder / "table.md").read_text(encoding="utf-8")


def make_language_model_plans(settings: LanguageModelSettings) -> list[LanguageModelPlan]:
    """Return one plan for each model of the settings.

    Raises:
        UserError: settings, text or a model that cannot be used.
    """
    from ksub_ds.evaluate.lm.causal import check_causal

    checked = settings.checked()
    for model in checked.model:
        check_causal(model)
    others = Skipped()
    text = find_text(checked.data, checked.languages, flag="--data", splits=checked.splits, others=others)
    LeftOut({language: each.skipped for language, each in text.items()}, others).report()
    folders = folders_of(checked.model, checked.out)
    return [LanguageModelPlan(checked, model, folder, text) for model, folder in folders.items()]


def _blocks(texts: list[str], start: int) -> Iterator[list[str]]:
    """Yield runs of documents with about BLOCK_CHARACTERS, always the same ones.

    Args:
        texts: all documents.
        start: how many are done already, which is where a block begins.
    """
    block: list[str] = []
    for text in texts[start:]:
        block.append(text)
        if sum(map(len, block)) >= BLOCK_CHARACTERS:
            yield block
            block = []
    if block:
        yield block


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of a language."""
    nats, num_bytes, tokens = math.fsum(result["nats"]), sum(result["num_bytes"]), result["tokens"]
    return {
        "bits_per_byte": nats / (math.log(2) * num_bytes),
        "nats_per_token": nats / tokens,
        "tokens_per_byte": tokens / num_bytes,
        "nats": nats,
        "tokens": tokens,
        "bytes": num_bytes,
        "documents": len(result["nats"]),
        "documents_not_restored": result["not_restored"],
        "unknown_tokens": result["unknown"],
        "available": result["available"],
        "cut": result["cut"],
        "skipped": result["skipped"],
    }

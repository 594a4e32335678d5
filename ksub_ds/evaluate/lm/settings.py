"""The settings of `ksub evaluate lm`."""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import language_name
from ksub_ds.common.option_help import Section
from ksub_ds.corpus.shards.dataset import MANIFEST
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.evaluate.lm.documents import Choice


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
        if (self.data / MANIFEST).is_file():
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

"""The settings of a run over Common Crawl (the command line of preprocessing/shard_cc.py), and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import LANGUAGES
from ksub_ds.common.option_help import Section
from ksub_ds.corpus.commoncrawl.dedup import Mode
from ksub_ds.corpus.commoncrawl.inputs import BASE_URL, check_request
from ksub_ds.corpus.commoncrawl.langid import IdentifierName
from ksub_ds.corpus.commoncrawl.perplexity import BUCKETS
from ksub_ds.corpus.shards.writer import check_shard_settings


@dataclass
class ShardCC:
    """Turn Common Crawl's WET files into token shards of the paper's 15 languages, as CCNet does.

    Alone or as `mpirun -n P python preprocessing/shard_cc.py ...` (or srun): the result is the same, bit for bit.
    The same command again does what is missing.
    """

    tokenizer: Path
    """A SentencePiece .model in XLM-R's layout, the folder of a HuggingFace tokenizer, or a name in the hub's cache."""
    out: Path
    """Folder to write the shards to; the ranks must share it."""
    input: Annotated[tuple[Path, ...], Section("input")] = ()
    """WET files, or folders with such files: .gz, .xz, .zst, .bz2 or plain."""
    snapshot: str | None = None
    """Instead of --input: a snapshot of Common Crawl, such as 2019-09."""
    segments: str = "0:1"
    """Which files of the snapshot's listing: first:end."""
    base_url: str = BASE_URL
    """Where the snapshot's listing and files are."""
    cache: Path = Path("cache")
    """Folder for the snapshot's files; the ranks must share it."""
    connections: int = 2
    """Downloads at a time."""
    dedup: Annotated[Mode, Section("selection")] = "keep-first"
    """Which copies of a paragraph stay: the first, none of several (as CCNet), or all."""
    langid: IdentifierName = "py3langid"
    """Language identifier: py3langid comes with its model, fasttext needs --langid-model."""
    langid_model: Path | None = None
    """fastText's lid.176.bin or lid.176.ftz, or a model with labels such as eng_Latn."""
    langid_threshold: float | None = None
    """Lowest confidence with which a page is kept. [0.5]"""
    languages: tuple[str, ...] = LANGUAGES
    """The languages to keep."""
    lm_models: Path | None = None
    """Folder of <lang>.arpa.bin and <lang>.sp.model for perplexity buckets. [no buckets: every page is "all"]"""
    keep_buckets: tuple[Literal["head", "middle", "tail", "all"], ...] = ("all", "head", "middle", "tail")
    """The buckets to keep."""
    min_length: int = 300
    """Characters a page needs after deduplication."""
    sequence_length: Annotated[int, Section("output")] = 512
    """Tokens per row, <s> and </s> included."""
    validation_fraction: float = 0.01
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    text_out: Path | None = None
    """Also write the documents as CCNet's JSON lines to this folder."""
    nfc: bool = False
    """Put text in Unicode's form NFC before tokenising; the tokenizer saved with the shards does so too."""
    keep_work: bool = False
    """Keep OUT/work, the intermediate files, for runs with other settings of the later stages."""
    strict: bool = False
    """Fail where a file of --input is left out or not read to its end, or a file or a language has no page."""
    dry_run: bool = False
    """Estimate disk and time from a sample; write nothing."""


def check(settings: ShardCC) -> None:
    """Check the settings.

    Raises:
        UserError: a setting out of range, or an unusable output path.
    """
    if bool(settings.input) == (settings.snapshot is not None):
        raise UserError("give either --input FILES or --snapshot NAME")
    if settings.snapshot is None and settings.segments != ShardCC.segments:
        raise UserError(f"--segments {settings.segments}: of a --snapshot; of --input give the files themselves")
    if settings.snapshot is not None:
        check_request(settings.snapshot, settings.segments, settings.base_url, settings.connections)
    if settings.min_length < 1:
        raise UserError(f"--min-length {settings.min_length}: must be at least 1")
    check_shard_settings(settings.sequence_length, settings.validation_fraction)
    if not settings.keep_buckets:
        raise UserError(f"--keep-buckets: name at least one of {', '.join(BUCKETS)}")
    for language in settings.languages or ("",):
        if language not in LANGUAGES:
            raise UserError(f"--languages {language}: must be of {', '.join(LANGUAGES)}")
    _check_output_paths(settings)


def _check_output_paths(settings: ShardCC) -> None:
    """Check that no output folder lies in an input folder or is used twice.

    Raises:
        UserError: one does, or is.
    """
    for option, folder in (("--out", settings.out), ("--text-out", settings.text_out)):
        for entry in settings.input:
            if folder is not None and entry.is_dir() and folder.resolve().is_relative_to(entry.resolve()):
                raise UserError(f"{option} {folder}: lies in the input folder {entry}; write somewhere else")
    if settings.text_out is not None and settings.text_out.resolve() == settings.out.resolve():
        raise UserError(f"--text-out {settings.text_out}: is --out too; give the text a separate folder")

"""From Common Crawl to token shards; what preprocessing/shard_cc.py runs.

    read       every WET file: check, quarantine, hash the paragraphs             OUT/work/read
    dedup      all hashes together, exchanged between the ranks                   OUT/work/dedup-*
    select     every file again: paragraphs, language, quality, length            OUT/work/select
    tokenise   every file's documents                                             OUT/work/tokenise
    pack       every language's tokens, in the order of the files                 OUT/<lang>/
    publish    quarantine.jsonl, report.json, manifest.json; OUT/work goes        OUT/

All is a function of the input and the settings: not of the number of ranks, nor of who did what when. A
rerun does what is missing. Files are in the order of their names (a snapshot's: of its listing), pages and
paragraphs in the order of their file; that is the order in which the first copy of a paragraph is kept.
"""

from contextlib import nullcontext
from typing import Any

from ksub_ds.common.logging import get_logger
from ksub_ds.common.mpi import Ranks
from ksub_ds.corpus.crawl_estimate import estimate
from ksub_ds.corpus.crawl_input import WetFile, describe, find_wet_files
from ksub_ds.corpus.crawl_pages import Selection
from ksub_ds.corpus.crawl_run import CrawlRun
from ksub_ds.corpus.crawl_settings import ShardCC, check
from ksub_ds.corpus.langid import load_identifier
from ksub_ds.corpus.perplexity import load_buckets
from ksub_ds.corpus.shard_folder import locked, make_folder
from ksub_ds.corpus.snapshot import fetch_snapshot
from ksub_ds.corpus.tokenizer import load_tokenizer


def shard_cc(settings: ShardCC, ranks: Ranks) -> dict[str, Any]:
    """Run all stages; called on every rank. Returns the report.

    Raises:
        UserError: a setting out of range, no input, no room, or shards made with other settings in the way.
    """
    if not ranks.is_main:
        get_logger().setLevel("WARNING")
    check(settings)
    files = ranks.on_main(lambda: find_files(settings, settings.segments))
    tokenizer = ranks.agree(lambda: load_tokenizer(settings.tokenizer))
    selection = ranks.agree(lambda: load_selection(settings))
    ranks.on_main(lambda: make_folder(settings.out))
    lock = locked(settings.out) if ranks.is_main else nullcontext()
    ranks.agree(lock.__enter__)
    try:
        return CrawlRun(settings, ranks, files, tokenizer, selection).run()
    finally:
        lock.__exit__(None, None, None)


def dry_run(settings: ShardCC, ranks: Ranks) -> str:
    """An estimate of time and disk for this many ranks, made by rank 0; empty on the others.

    Of a snapshot one file is fetched and stands for all.
    """

    def on_rank_0() -> str:
        first, _, end = settings.segments.partition(":")
        files = find_files(settings, f"{first}:{int(first) + 1}" if first.isdigit() and end.isdigit() else "")
        total = sum(file.size for file in files) * (1 if settings.snapshot is None else int(end) - int(first))
        selection, tokenizer = load_selection(settings), load_tokenizer(settings.tokenizer)
        return estimate(
            files, total, selection, tokenizer, settings.dedup, ranks.size, settings.text_out is not None, settings.out
        )

    check(settings)
    return ranks.on_main(on_rank_0)


def find_files(settings: ShardCC, segments: str) -> list[WetFile]:
    """The input's files in their order; of a snapshot those of `segments`, fetched first."""
    if settings.snapshot is None:
        return find_wet_files(settings.input)
    paths = fetch_snapshot(settings.snapshot, segments, settings.base_url, settings.cache, settings.connections)
    return [describe(path, path.relative_to(settings.cache).as_posix()) for path in paths]


def load_selection(settings: ShardCC) -> Selection:
    """What decides which pages stay."""
    identifier = load_identifier(settings.langid, settings.langid_model, settings.langid_threshold)
    buckets = load_buckets(settings.lm_models)
    languages = tuple(sorted(set(settings.languages)))
    return Selection(identifier, buckets, languages, tuple(sorted(set(settings.keep_buckets))), settings.min_length)

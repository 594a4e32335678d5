r"""Common Crawl to token shards of 15 languages: check, deduplicate, identify, filter, tokenise, pack.

    python preprocessing/shard_cc.py --input wet --tokenizer sentencepiece.bpe.model --out cc15
    mpirun -n 8 python preprocessing/shard_cc.py --snapshot 2019-09 --segments 0:40 --cache cache \
        --tokenizer sentencepiece.bpe.model --out cc15

`wet` holds WET files. Any number of ranks gives the same bytes. The work is in ksub_ds/corpus/commoncrawl/pipeline.py.
"""

import contextlib
import io
import sys

from ksub_ds.common.distributed import is_main
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.mpi import MPIComm
from ksub_ds.common.options import parse
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.pipeline import dry_run, shard_cc
from ksub_ds.corpus.commoncrawl.report import REPORT, SHOWN, exit_line, left_out
from ksub_ds.corpus.statistics import corpus_table


def main() -> None:
    """Parse the command line, make the shards and print their table."""
    with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()):  # the help, once
        settings = parse(ShardCC, None, "preprocessing/shard_cc.py")
    ranks = MPIComm()
    with ranks.together():
        if settings.dry_run:
            lines = [dry_run(settings, ranks)]
        else:
            report = shard_cc(settings, ranks)
            missing = left_out(report, settings.languages)
            lines = [corpus_table(settings.out), *missing[:SHOWN], exit_line(report)]
            if len(missing) > SHOWN:
                lines.insert(-1, f"and {len(missing) - SHOWN:,} more files or languages; see {REPORT}")
    if ranks.is_main:
        print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_main(main))

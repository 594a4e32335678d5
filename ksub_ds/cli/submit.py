"""`ksub submit`: jobs for SLURM, whose options are parsed before they are submitted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ksub_ds.common.options import parse

if TYPE_CHECKING:
    from ksub_ds.cluster.submit import Submit


def submit(arguments: Sequence[str]) -> int:
    """Submit a job, or print what would be submitted; return the exit code."""
    from ksub_ds.cluster.submit import submit as submit_job

    return submit_job(arguments, check_job)


def check_job(settings: "Submit", arguments: list[str]) -> None:
    """Parse a job's options as the job will, and check what needs no file.

    Args:
        settings: those of `ksub submit`.
        arguments: the words behind `--`, for the job.
    """
    if settings.job == "pretrain":
        from ksub_ds.pretrain.engine import find_deepspeed_config
        from ksub_ds.pretrain.recipe import parse_recipe, resolve

        find_deepspeed_config(resolve(parse_recipe(arguments), settings.ranks, on_gpu=True).deepspeed)
    elif settings.job == "evaluate":
        from ksub_ds.evaluate.__main__ import parse_settings

        parse_settings(arguments)
    else:
        from ksub_ds.corpus.commoncrawl.config import ShardCC, check

        check(parse(ShardCC, arguments, "preprocessing/shard_cc.py"))

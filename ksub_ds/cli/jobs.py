"""`ksub submit`: jobs for SLURM, whose options are parsed here as the job will parse them."""

from collections.abc import Sequence
from typing import Any

from ksub_ds.common.options import parse


def submit(arguments: Sequence[str]) -> int:
    """Submit a job, or print what would be submitted."""
    from ksub_ds.cluster.submit import submit as submit_job

    return submit_job(arguments, check_job)


def check_job(settings: Any, arguments: list[str]) -> None:
    """Parse what `ksub submit` is to hand to a job, as the job will, and check what needs no file.

    Args:
        settings: of `ksub submit` (cluster/submit.py).
    """
    if settings.job == "pretrain":
        from ksub_ds.pretrain.engine import find_deepspeed_config
        from ksub_ds.pretrain.recipe import Recipe, resolve

        recipe = parse(Recipe, arguments, "ksub pretrain")
        find_deepspeed_config(resolve(recipe, settings.ranks, on_gpu=True).deepspeed)
    elif settings.job == "evaluate":
        from ksub_ds.evaluate.__main__ import parse_settings

        parse_settings(arguments)
    else:
        from ksub_ds.corpus.commoncrawl.config import ShardCC, check

        check(parse(ShardCC, arguments, "preprocessing/shard_cc.py"))

"""One run of a recipe on the ranks this process belongs to: fresh, or from the newest good checkpoint."""

import dataclasses
import logging
import shlex
from pathlib import Path

from ksub_ds.common import distributed
from ksub_ds.common.logging import add_log_file, get_logger
from ksub_ds.corpus.batches import HeldOutBatches, TrainingBatches
from ksub_ds.pretrain import builders, checkpoint
from ksub_ds.pretrain.checkpoint import TrainerState
from ksub_ds.pretrain.loop import Training, evaluation_is_missing, train
from ksub_ds.pretrain.metrics import Recorder
from ksub_ds.pretrain.preemption import StopRequest
from ksub_ds.pretrain.prefetch import BatchFeed
from ksub_ds.pretrain.recipe import Recipe, accumulation_steps, resolve
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.saving import CheckpointWriter
from ksub_ds.pretrain.sources import Sources, load_sources, verify_shards
from ksub_ds.pretrain.warm_start import keep_copy


def run(recipe: Recipe) -> int:
    """Start or continue the run of a recipe; every rank calls this. Returns the exit code (`__main__` lists them).

    Raises:
        UserError: on every rank alike.
    """
    if distributed.world_size() > 1:  # first, so that one rank's mistake is told by all
        distributed.init_distributed()
    folder = RunFolder(recipe.out)
    before = distributed.broadcast_object(distributed.on_main(folder.micro_batch_size))
    recipe = distributed.raise_on_all_ranks(lambda: _settle(recipe, before))
    distributed.init_distributed()
    if not distributed.is_main():
        get_logger().setLevel(logging.ERROR)
    logging.raiseExceptions = False  # a full disk must not print a traceback per line of train.log
    distributed.on_main(folder.lock)
    distributed.watchdog().on_failure = folder.record_failure
    try:
        sources = distributed.raise_on_all_ranks(lambda: load_sources(recipe))
        verify_shards(sources.dataset)
        distributed.on_main(lambda: folder.claim(sources.identity(recipe), sources.table, sources.tokenizer))
        if recipe.warm_start is not None:
            distributed.on_main(lambda: keep_copy(recipe.warm_start, folder.warm_start))
        distributed.on_main(lambda: add_log_file(folder.log))
        return _train(recipe, folder, sources)
    finally:
        folder.unlock()


def _settle(recipe: Recipe, before: int | None) -> Recipe:
    """The recipe with nothing left open, checked together with its ds_configs file.

    Args:
        before: micro-batch size of the run that is continued. Dropout differs from micro-batch to micro-batch, so
            one that was not asked for stays as it was, where today's number of ranks allows it.
    """
    world_size = distributed.world_size()
    settled = resolve(recipe, world_size, distributed.has_gpu())
    if recipe.micro_batch_size is None and before and settled.global_batch_size % (before * world_size) == 0:
        settled = dataclasses.replace(settled, micro_batch_size=before)
    builders.check_mechanics(settled)
    return settled


def _train(recipe: Recipe, folder: RunFolder, sources: Sources) -> int:
    rank, world_size, log = distributed.rank(), distributed.world_size(), get_logger()
    start, state = _start_state(recipe, folder, sources)
    evaluated = not builders.held_out_languages(sources.dataset) or not evaluation_is_missing(
        recipe, folder, state.step
    )
    if state.step >= recipe.max_steps and evaluated:
        log.info(f"{folder.path}: step {state.step:,} of {recipe.max_steps:,} is done; nothing left to train")
        return 0

    teacher = distributed.raise_on_all_ranks(lambda: builders.build_teacher(recipe, sources))
    model = distributed.raise_on_all_ranks(lambda: builders.build_model(recipe, sources))
    engine = distributed.raise_on_all_ranks(lambda: builders.build_engine(recipe, model, folder))
    if start is not None:
        checkpoint.load(engine, start, state)
        log.info(f"continuing from {start}")
    batches = TrainingBatches(
        sources.dataset, recipe.global_batch_size, recipe.alpha, recipe.seed, recipe.mlm_probability
    )
    languages = builders.held_out_languages(sources.dataset)
    held_out = None
    if languages:  # batches as small as the training's: evaluation must not need more memory
        held_out = HeldOutBatches(
            sources.dataset, recipe.eval_sequences, recipe.mlm_probability, recipe.micro_batch_size
        )
    if held_out is None and recipe.eval_every_steps:
        log.info("no held-out part in the shards: no evaluation (make them with --validation-fraction 0.01)")

    accumulation = accumulation_steps(recipe, world_size)
    with (
        BatchFeed(batches, recipe.micro_batch_size, accumulation, rank, world_size) as feed,
        StopRequest(folder.stop, recipe.max_hours) as stop,
        CheckpointWriter(engine, folder.checkpoints, recipe.keep_last) as writer,
    ):
        builders.describe_start(recipe, sources, engine, feed.take(state.step))
        with distributed.raise_on_all_ranks(
            lambda: Recorder(folder, engine.monitor, state.step, recipe.max_steps)
        ) as recorder:
            training = Training(recipe, folder, engine, feed, held_out, languages, recorder, writer, stop, teacher)
            state, reason = train(training, state)
        exit_codes = [code for code in distributed.gather_objects(stop.exit_code()) if code]
    if reason is None:
        log.info(f"done: step {state.step:,}. Next: ksub export {shlex.quote(str(folder.path))} --out model")
        return 0
    distributed.on_main(folder.honour_stop)
    log.info(f"stopped after step {state.step:,} of {recipe.max_steps:,} ({reason}), saved; the same command continues")
    return exit_codes[0] if exit_codes else 0


def _start_state(recipe: Recipe, folder: RunFolder, sources: Sources) -> tuple[Path | None, TrainerState]:
    """The checkpoint to continue from, and the state it holds; (None, step 0) for a fresh start."""
    fresh = TrainerState(codes_sha256=sources.table.sha256, data_fingerprint=sources.dataset.fingerprint)

    def find() -> tuple[Path | None, TrainerState]:
        start = checkpoint.find_start(folder.checkpoints)
        return start, checkpoint.read_trainer_state(start, fresh) if start else fresh

    start, state = distributed.broadcast_object(distributed.on_main(find))
    return start, dataclasses.replace(state, world_size=distributed.world_size(), precision=recipe.precision)

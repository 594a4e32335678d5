"""One run of a recipe on the ranks this process belongs to: fresh, or from the newest good checkpoint."""

import dataclasses
import logging
import shlex
from pathlib import Path

from ksub_ds.common import distributed
from ksub_ds.common.errors import RESUME
from ksub_ds.common.gpu import deterministic_algorithms, out_of_memory_is_told
from ksub_ds.common.logging import add_log_file, close_log_files, get_logger
from ksub_ds.corpus.batches import HeldOutBatches, TrainingBatches
from ksub_ds.pretrain import builders, checkpoint
from ksub_ds.pretrain.checkpoint import CheckpointWriter, TrainerState
from ksub_ds.pretrain.engine import GuardedUpdate
from ksub_ds.pretrain.heldout_eval import held_out_languages
from ksub_ds.pretrain.loop import Training, evaluation_is_missing, train
from ksub_ds.pretrain.metrics import TrainingMetrics
from ksub_ds.pretrain.preemption import StopRequest
from ksub_ds.pretrain.prefetch import BatchPrefetcher
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.resolved_run import ResolvedRun, open_sources, resolve_settings, verify_shards
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.warm_start import keep_copy


def run(recipe: Recipe) -> int:
    """Start or continue the run of a recipe; every rank calls this.

    Returns:
        The exit code (`__main__` lists them).

    Raises:
        UserError: on every rank alike.
    """
    if distributed.world_size() > 1:  # first, so that all ranks report one rank's mistake
        distributed.init_distributed()
    folder = RunFolder(recipe.out)
    before = distributed.broadcast_object(distributed.on_main(folder.micro_batch_size))
    settings = distributed.raise_on_all_ranks(lambda: resolve_settings(recipe, before))
    distributed.init_distributed()
    if not distributed.is_main():
        get_logger().setLevel(logging.ERROR)
    logging.raiseExceptions = False  # a full disk must not print a traceback per line of train.log
    distributed.on_main(folder.lock)
    distributed.watchdog().on_failure = folder.record_early_failure
    try:
        resolved = distributed.raise_on_all_ranks(lambda: open_sources(settings))
        verify_shards(resolved.dataset)
        news = distributed.on_main(lambda: folder.extend(resolved.identity())) if recipe.extend else None
        distributed.on_main(lambda: folder.claim(resolved.identity(), resolved.table, resolved.tokenizer))
        distributed.watchdog().on_failure = folder.record_failure
        if recipe.warm_start is not None:
            copied = (recipe.warm_start, folder.warm_start, resolved.warm_start_sha256)
            distributed.on_main(lambda: keep_copy(*copied))
        distributed.on_main(lambda: add_log_file(folder.log))
        if news:
            get_logger().info(news)
        with (
            deterministic_algorithms(settings.recipe.deterministic and distributed.has_gpu()),
            out_of_memory_is_told(builders.micro_batch_advice(resolved)),
        ):
            return _train(resolved, folder)
    finally:
        close_log_files()
        folder.unlock()


def _train(run: ResolvedRun, folder: RunFolder) -> int:
    """Build model, engine and batches, train, and return the exit code."""
    recipe, log = run.recipe, get_logger()
    start, state = _start_state(run, folder)
    languages = held_out_languages(run.dataset, pairs=recipe.tlm_share > 0)
    evaluated = not languages or not evaluation_is_missing(recipe, folder, state.step)
    if state.step >= recipe.max_steps and evaluated:
        log.info(f"{folder.path}: step {state.step:,} of {recipe.max_steps:,} is done; nothing left to train")
        return 0

    with out_of_memory_is_told("model and optimizer do not fit; try --deepspeed zero3_offload"):
        teacher = distributed.raise_on_all_ranks(lambda: builders.build_teacher(run))
        model = distributed.raise_on_all_ranks(lambda: builders.build_model(run))
        engine = distributed.raise_on_all_ranks(lambda: builders.build_engine(run, model, folder.tensorboard))
    if start is not None:
        checkpoint.load(engine, start, state)
        log.info(f"continuing from {start}")
    sampling = (recipe.alpha, recipe.seed, recipe.masked_share)
    batches = TrainingBatches(run.dataset, run.batch.total, *sampling, run.pairs)
    held_out = None
    if languages:  # batches as small as the training's: evaluation must not need more memory
        each = (recipe.eval_sequences, recipe.masked_share, run.batch.micro)
        held_out = HeldOutBatches(run.dataset, *each, pairs=run.pairs)
    elif recipe.eval_every_steps:
        log.info("no held-out part in the shards: no evaluation (make them with --validation-fraction 0.01)")

    place = distributed.rank(), run.batch.world
    with (
        BatchPrefetcher(batches, run.batch.micro, run.batch.accumulation, *place) as prefetcher,
        StopRequest(folder.stop, recipe.max_hours) as stop,
        CheckpointWriter(engine, folder.checkpoints, recipe.keep_last, recipe.plan().decay_begins_after) as checkpoints,
    ):
        first = prefetcher.take(state.step)
        builders.describe_start(run, engine, first, builders.compile_where_possible(run, engine, first))
        work = builders.count_work(run, engine)
        with distributed.raise_on_all_ranks(
            lambda: TrainingMetrics(folder, engine.monitor, state.step, recipe.max_steps, work)
        ) as metrics:
            update = GuardedUpdate(engine, recipe.gradient_clipping)
            training = Training(
                recipe, folder, engine, update, prefetcher, held_out, languages, run.tokenizer, metrics, checkpoints,
                stop, teacher,
            )  # fmt: skip
            state, reason = train(training, state)
        exit_codes = [code for code in distributed.gather_objects(stop.exit_code()) if code]
    if reason is None:
        if recipe.decay_steps == 0:
            log.info("the learning rate is still at its peak: --extend --max-steps M --decay-steps D brings it down")
        log.info(f"done: step {state.step:,}. Next: ksub export {shlex.quote(str(folder.path))} --out model")
        return 0
    distributed.on_main(folder.clear_stop_file)
    log.info(f"stopped after step {state.step:,} of {recipe.max_steps:,} ({reason}), saved; {RESUME}")
    return exit_codes[0] if exit_codes else 0


def _start_state(run: ResolvedRun, folder: RunFolder) -> tuple[Path | None, TrainerState]:
    """Return the checkpoint to continue from and the state it holds; (None, step 0) for a fresh start."""
    fresh = TrainerState(codes_sha256=run.table.sha256, data_fingerprint=run.dataset.fingerprint)

    def find() -> tuple[Path | None, TrainerState]:
        start = checkpoint.find_start(folder.checkpoints)
        return start, checkpoint.read_matching_state(start, fresh) if start else fresh

    start, state = distributed.broadcast_object(distributed.on_main(find))
    return start, dataclasses.replace(state, world_size=run.batch.world, precision=run.recipe.precision)

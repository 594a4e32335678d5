"""Training one classifier from a model folder to a model folder: open it, fine-tune it, keep the best epoch."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.files import atomic_folder
from ksub_ds.common.gpu import out_of_memory_is_told
from ksub_ds.evaluate.finetune.classifier import load_classifier
from ksub_ds.evaluate.finetune.encoding import Encoded, PairEncoder
from ksub_ds.evaluate.finetune.loop import FineTuning, Outcome, Validate, finetune
from ksub_ds.model.sequence_length import limit_tokenizer
from ksub_ds.pretrain.builders import set_attention


@dataclass(frozen=True)
class ClassifierTraining:
    """A classifier to train: what it starts from, on which rows, and where it goes.

    Attributes:
        model: folder or name of the pretrained model.
        body: folder of a fine-tuned model that gives the weights below the head instead; None = `model`.
        num_labels: outputs.
        train: the rows.
        validate: (model, check) -> scores of an epoch, with "score"; it calls check every few batches.
        work: folder for state and model.
        identity: model, data and settings in one string.
        encoder: the tokenizer, saved beside the model.
        settings: how it is trained.
        keep_model: write WORK/model, a HuggingFace folder of the best epoch.
        attention: its implementation, by transformers' name; None = transformers' choice.
        freeze_embedding: train all weights but those of the tokens' embedding.
        classes: their names, kept in the model's config.json; none = transformers' LABEL_0 and so on.
    """

    model: str
    body: str | None
    num_labels: int
    train: Encoded
    validate: Validate
    work: Path
    identity: str
    encoder: PairEncoder
    settings: FineTuning
    keep_model: bool
    attention: str | None = None
    freeze_embedding: bool = False
    classes: tuple[str, ...] = ()


def train_classifier(
    training: ClassifierTraining, check: Callable[[], None] = lambda: None, several_ranks: bool = False
) -> dict[str, Any]:
    """Train a classifier, alone or as one of several ranks.

    Args:
        training: what to train.
        check: called every few steps; may raise to give up.
        several_ranks: this process is one rank of a group that trains together; all call this.

    Returns:
        As JSON values: the scores of all epochs, which was best, and what else touches them.

    Raises:
        UserError: memory has run out, a loss that is not finite, a batch that the ranks cannot share.
    """
    settings, work = training.settings, training.work
    too_much = f"fine-tuning with a batch size of {settings.batch_size}; try a smaller one or more --ranks-per-job"
    with out_of_memory_is_told(too_much):
        model, outcome = _train(training, check, several_ranks)
    if training.keep_model and (not several_ranks or distributed.is_main()):
        with atomic_folder(work / "model") as temporary:
            model.save_pretrained(temporary)
            training.encoder.save(temporary)
            limit_tokenizer(temporary, model.config)
    cut = {"cut_examples": training.train.cut} if training.train.cut else {}
    return {
        "epochs": outcome.epochs,
        "best_epoch": outcome.best_epoch,
        "train_examples": len(training.train),
        **cut,
        "ranks": distributed.world_size() if several_ranks else 1,
        "attention": model.config._attn_implementation,
    }


def _train(training: ClassifierTraining, check: Callable[[], None], several_ranks: bool) -> tuple[Any, Outcome]:
    """Return the trained model, on its device, and what its fine-tuning gave."""
    settings, work = training.settings, training.work
    model = load_classifier(training.model, training.num_labels, settings.seed, training.body)
    model = model.to(distributed.device())
    set_attention(model, training.attention)
    if training.freeze_embedding:
        model.get_input_embeddings().requires_grad_(False)
    if training.classes:
        model.config.id2label = dict(enumerate(training.classes))
        model.config.label2id = {name: number for number, name in enumerate(training.classes)}
    work.mkdir(parents=True, exist_ok=True)
    return model, finetune(
        model, training.train, settings, training.validate, work, training.identity, check, several_ranks
    )


def forget_state(work: Path) -> None:
    """Remove what only a continuation of a fine-tuning would need."""
    for name in ("state.safetensors", "best.safetensors"):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "ranks", ignore_errors=True)

"""One fine-tuning job of a queue: open the model, train it, keep the best epoch; alone or on several ranks."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json, write_json
from ksub_ds.evaluate.finetune.classifier import load_classifier
from ksub_ds.evaluate.finetune.encoding import Encoded, PairEncoder
from ksub_ds.evaluate.finetune.loop import FineTuning, finetune
from ksub_ds.pretrain.builders import set_attention


@dataclass(frozen=True)
class TrainingJob:
    """What a fine-tuning starts from and where it goes.

    Attributes:
        model: folder or name of the pretrained model.
        body: folder of a fine-tuned model that gives the weights below the head instead; None = `model`.
        num_labels: outputs.
        train: the rows.
        validate: model -> scores of an epoch, with "score".
        work: folder for state and model.
        identity: model, data and settings in one string.
        keep_model: write WORK/model, a HuggingFace folder of the best epoch.
        attention: its implementation, by transformers' name; None = transformers' choice.
    """

    model: str
    body: str | None
    num_labels: int
    train: Encoded
    validate: Callable[[Any], dict[str, Any]]
    work: Path
    identity: str
    encoder: PairEncoder
    settings: FineTuning
    keep_model: bool
    attention: str | None = None


def train_classifier(job: TrainingJob, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
    """Do it; returns the scores of all epochs and which was best."""
    model = load_classifier(job.model, job.num_labels, job.settings.seed, job.body).to(distributed.device())
    set_attention(model, job.attention)
    job.work.mkdir(parents=True, exist_ok=True)
    outcome = finetune(model, job.train, job.settings, job.validate, job.work, job.identity, check, several_ranks)
    if job.keep_model and (not several_ranks or distributed.is_main()):
        with atomic_folder(job.work / "model") as temporary:
            model.save_pretrained(temporary)
            job.encoder.save(temporary)
    ranks = distributed.world_size() if several_ranks else 1
    told = {"best_epoch": outcome.best_epoch, "train_examples": len(job.train)}
    return {"epochs": outcome.epochs, **told, "ranks": ranks, "attention": model.config._attn_implementation}


def forget_state(work: Path) -> None:
    """Remove what only a continuation of a fine-tuning would need."""
    for name in ("state.safetensors", "best.safetensors"):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "ranks", ignore_errors=True)


# ---------------------------------------------------------------- several ranks


def train_on_ranks(plan: dict[str, Any], job: str, work: Path, ranks: int, check: Callable[[], None]) -> dict[str, Any]:
    """Have `ranks` processes of this machine do a fine-tuning job together, and return its result.

    Args:
        plan: what `ksub_ds.evaluate.ranks` needs to build the plan anew, as JSON values.
        job: name of the job.
        work: its folder.
        check: called every second; when it raises, the ranks are ended.

    Raises:
        UserError: a rank failed.
    """
    folder = work / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    write_json(folder / "task.json", plan | {"job": job})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    try:
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = os.environ | {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-m", "ksub_ds.evaluate.ranks", str(folder / "task.json"), str(os.getpid())]
            processes.append(subprocess.Popen(command, env=environment))
        while any(process.poll() is None for process in processes):
            failed = [process for process in processes if process.poll() not in (None, 0)]
            if failed:
                break
            check()
            time.sleep(1)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if not result.exists():
        codes = ", ".join(str(process.returncode) for process in processes)
        raise UserError(f"{job}: its {ranks} ranks ended with exit codes {codes}; their messages stand above")
    outcome: dict[str, Any] = read_json(result)
    return outcome

"""Teach a compressed sentence encoder to give the sentence vectors that the original gives.

    loss = mean over texts of |s - t|^2 / |t|^2        s, t: the vectors of both, after every module of modules.json

Texts need no labels. A part of them is held out: what is kept is the state that was best there, and the training ends
early when a quarter of its time has passed without a new best after the start. Adam's steps are as large for a good
student as for a bad one, so a good one learns at a lower rate. That is a function of the loss at the start and of the
time that is spent, the texts of a step one of (seed, step), so a run that was interrupted goes on from its last
snapshot as if it had not been.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, json_bytes, read_json, sha256_bytes, sha256_file, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.token_counts import read_documents
from ksub_ds.model.loading import quiet_transformers

BATCH = 64
LR, TABLE_LR = 2e-4, 2e-3  # peaks, of the network and of its embedding
GOOD = 0.15  # a student that starts with a smaller loss learns at sqrt(loss / GOOD) of the peaks
WARM_UP = 0.05  # of the time
EVALUATIONS = 20
PATIENCE = 5  # evaluations without a gain
LEAST_TEXTS = 20
MOST_LINES, MOST_TEXTS = 2_000_000, 200_000  # read, and drawn of these
MOST_HELD_OUT = 512
PROGRESS = "progress.json"  # of a snapshot


@dataclass
class DistillationProgress:
    """How far a distillation has come.

    Attributes:
        step: updates so far.
        seconds: spent on them, teacher included.
        curve: of each evaluation: minutes, step, and the loss on the held-out texts; the first is before training.
        best: the least of these losses.
        key: of what is trained towards what, for snapshots.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = float("inf")
    key: str = ""

    @property
    def since_best(self) -> int:
        """Evaluations since the best one after the start, which the first steps may lead away from."""
        losses = [point["loss"] for point in self.curve[1:]]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def rate(self) -> float:
        """What the peaks of the learning rate are multiplied by."""
        return min(1.0, (self.curve[0]["loss"] / GOOD) ** 0.5)


class SentenceDistillation:
    """The training of one student.

    Args:
        student: a SentenceTransformer; its encoder is trained in place, the modules behind it stay as they are.
        teacher: another one, of the same width.
        texts: at least 20 (LEAST_TEXTS); of more than 200,000, so many are drawn.
        minutes: to spend on updates; the evaluations, at most 21 of at most 512 texts, come on top.
        seed: of the held-out part and the order.
        clock: in seconds; `time.process_time` counts the processor's.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        texts: list[str],
        minutes: float,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.student, self.teacher, self.seed, self.clock = student, teacher, seed, clock
        self.limit = 60 * minutes
        drawn = np.random.default_rng(seed).permutation(len(texts))[:MOST_TEXTS]
        held_out = min(MOST_HELD_OUT, len(drawn) // 10)
        self.held_out = [texts[place] for place in drawn[:held_out]]
        self.texts = [texts[place] for place in drawn[held_out:]]
        self.targets: dict[int, Tensor] = {}
        self.progress = DistillationProgress()
        self.best: dict[str, Tensor] = {}
        for module in list(student)[1:]:
            module.requires_grad_(False)
        rows = list(student[0].auto_model.get_input_embeddings().parameters())
        rest = [each for each in student.parameters() if not any(each is row for row in rows)]
        groups = [{"params": [each for each in rows if each.requires_grad], "peak": TABLE_LR}]
        groups.append({"params": [each for each in rest if each.requires_grad], "peak": LR})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
        self.order = lru_cache(maxsize=1)(self._order)

    def run(self, state: Path | None = None, key: str = "") -> DistillationProgress:
        """Train until the time is spent or nothing is gained; the student then has the best state.

        Args:
            state: folder of snapshots, from which it goes on; the caller removes it in the end. [none are kept]
            key: of what is trained towards what.

        Raises:
            UserError: the snapshots are of another distillation, or the vectors are of another width.
        """
        self.progress.key = key
        self.student.eval()  # no dropout: the targets are exact
        if state is not None and (state / PROGRESS).is_file():
            self._resume(state)
        else:
            self._evaluate(state)
        while self.progress.seconds < self.limit and self.progress.since_best < PATIENCE:
            self._step()
            if self.progress.seconds >= self.limit * len(self.progress.curve) / EVALUATIONS:
                self._evaluate(state)
        self.student.load_state_dict(self.best, strict=False)
        return self.progress

    def _step(self) -> None:
        start, progress = self.clock(), self.progress
        spent = progress.seconds / self.limit
        share = max(0.01, min((spent + 0.001) / WARM_UP, (1 - spent) / (1 - WARM_UP)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share * progress.rate
        steps = max(1, len(self.texts) // BATCH)
        epoch, place = divmod(progress.step, steps)
        rows = self.order(epoch)[place * BATCH : (place + 1) * BATCH]
        loss = relative_loss(encode(self.student, [self.texts[row] for row in rows]), self._targets(rows))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        progress.step += 1
        progress.seconds += self.clock() - start

    def _order(self, epoch: int) -> list[int]:
        """Return the order of the texts in an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.texts)).tolist()

    def _targets(self, rows: list[int]) -> Tensor:
        """Return the teacher's vectors of some texts, (B, d), each computed once."""
        missing = [row for row in rows if row not in self.targets]
        if missing:
            with torch.no_grad():
                self.targets |= zip(missing, encode(self.teacher, [self.texts[row] for row in missing]), strict=True)
        return torch.stack([self.targets[row] for row in rows])

    @cached_property
    def _held_out_batches(self) -> list[tuple[list[str], Tensor]]:
        """The held-out texts, and the teacher's vectors of them."""
        with torch.no_grad():
            batches = (self.held_out[first : first + BATCH] for first in range(0, len(self.held_out), BATCH))
            return [(texts, encode(self.teacher, texts)) for texts in batches]

    @torch.no_grad()
    def _evaluate(self, state: Path | None) -> None:
        """Measure the held-out texts, keep the best weights, and write a snapshot.

        Raises:
            UserError: the loss is not finite.
        """
        progress = self.progress
        losses = []
        for texts, targets in self._held_out_batches:
            losses.append(float(relative_loss(encode(self.student, texts), targets)) * len(texts))
        loss = sum(losses) / len(self.held_out)
        progress.curve.append({"minutes": progress.seconds / 60, "step": progress.step, "loss": loss})
        get_logger().info(
            f"distilling: {progress.seconds / 60:.1f} of {self.limit / 60:g} minutes, step {progress.step:,}, "
            f"held-out loss {loss:.4f}"
        )
        if not loss < float("inf"):
            raise UserError(
                f"--distill: the loss is {loss} at step {progress.step:,}; the texts or the model are damaged"
            )
        if loss < progress.best:
            progress.best = loss
            self.best = {name: value.detach().clone() for name, value in self.student.named_parameters()}
        if state is not None:
            self._snapshot(state)

    def _snapshot(self, state: Path) -> None:
        now = {name: value.detach() for name, value in self.student.named_parameters()}
        names = {id(value): name for name, value in self.student.named_parameters()}
        moments = {
            f"{names[id(value)]}:{key}": moment
            for value, kept in self.optimizer.state.items()
            for key, moment in kept.items()
        }
        with atomic_folder(state) as temporary:
            save_file(self.best, temporary / "best.safetensors")
            save_file(now, temporary / "now.safetensors")
            save_file(moments, temporary / "adam.safetensors")
            write_json(temporary / PROGRESS, asdict(self.progress))

    def _resume(self, state: Path) -> None:
        """Go on from a snapshot.

        Raises:
            UserError: it is of another distillation, or damaged.
        """
        damaged = UserError(f"{state}: holds damaged snapshots; remove the folder to begin this distillation anew")
        try:
            progress = DistillationProgress(**read_json(state / PROGRESS))
        except TypeError as error:
            raise damaged from error
        if progress.key != self.progress.key:
            raise UserError(
                f"{state}: holds snapshots of another distillation (other text, model, codes, --minutes or --seed); "
                "give the same again, or remove the folder to begin this one"
            )
        self.progress = progress
        named = dict(self.student.named_parameters())
        try:
            self.best = load_file(state / "best.safetensors")
            self.student.load_state_dict(load_file(state / "now.safetensors"), strict=False)
            for name, value in load_file(state / "adam.safetensors").items():
                parameter, _, key = name.rpartition(":")
                self.optimizer.state[named[parameter]][key] = value
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise damaged from error
        get_logger().info(f"distilling: goes on from step {self.progress.step:,} ({state})")


def encode(encoder: Any, texts: list[str]) -> Tensor:
    """Return the sentence vectors of some texts, (B, d), with a gradient; before each stands the default prompt."""
    prompt = encoder.prompts.get(encoder.default_prompt_name)
    return encoder(encoder.preprocess(texts, prompt=prompt))["sentence_embedding"]


def relative_loss(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows of |s - t|^2 / |t|^2.

    Raises:
        UserError: the vectors are of another width than the targets.
    """
    if vectors.shape != targets.shape:
        raise UserError(f"the student's vectors have {vectors.shape[1]} numbers, the original's {targets.shape[1]}")
    return ((vectors - targets).square().sum(dim=1) / targets.square().sum(dim=1).clamp(min=1e-12)).mean()


def check_snapshots(state: Path) -> None:
    """Check that snapshots may be kept in a folder, which is removed in the end.

    Raises:
        UserError: something else is there.
    """
    ours = state.is_dir() and ((state / PROGRESS).is_file() or not any(state.iterdir()))
    if state.exists() and not ours:
        raise UserError(f"{state}: would be replaced by the snapshots of --distill; move it, or choose another --out")


def read_texts(path: Path) -> list[str]:
    """Read what is learned from, each text once.

    Args:
        path: a file or folder of texts, or of documents: each line is a text.

    Raises:
        UserError: there is no text, or too little.
    """
    lines = (line.strip() for document in read_documents(path, "--distill") for line in document.split("\n"))
    texts = list(dict.fromkeys(islice(filter(None, lines), MOST_LINES)))
    if len(texts) < LEAST_TEXTS:
        raise UserError(
            f"--distill {path}: holds {len(texts)} texts; give at least {LEAST_TEXTS}, and better thousands"
        )
    return texts


def open_teacher(name: str) -> Any:
    """Open the sentence encoder that others learn from, in float32.

    Args:
        name: its folder, or its name on the hub.

    Raises:
        UserError: sentence-transformers cannot open it.
    """
    from sentence_transformers import SentenceTransformer

    try:
        with quiet_transformers():
            return SentenceTransformer(name, device="cpu", trust_remote_code=False).float()
    except Exception as error:  # of many kinds, as there are modules
        about = str(error).strip().split("\n")[0][:200].rstrip(". ")
        raise UserError(
            f"--distill: sentence-transformers cannot open {name} ({type(error).__name__}: {about})"
        ) from error


def distil_folder(
    folder: Path, teacher: Any, original: str, texts: list[str], minutes: float, seed: int, state: Path
) -> dict[str, Any]:
    """Distil the compressed sentence encoder in a folder, and write its weights there.

    Args:
        folder: of the compressed model.
        teacher: the original, opened.
        original: its folder or name.
        texts: to learn from.
        minutes: to spend.
        seed: of the held-out part and the order.
        state: folder of snapshots; the caller removes it when the model is where it belongs.

    Returns:
        What compression.json says of it.

    Raises:
        UserError: the snapshots are of another distillation, or the texts or the model are damaged.
    """
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        student = SentenceTransformer(str(folder), device="cpu")
    stored = student[0].auto_model.dtype
    student = student.float()  # in half precision AdamW's epsilon would be zero, and small updates lost
    training = SentenceDistillation(student, teacher, texts, minutes, seed)
    weights = sha256_file(folder / "model.safetensors")
    if Path(original).is_dir():
        original = str(Path(original).resolve())
    key = sha256_bytes(json_bytes([weights, original, minutes, seed, sha256_bytes("\n".join(texts).encode())]))
    progress = training.run(state, key)
    with quiet_transformers():
        student[0].auto_model.to(stored).save_pretrained(folder)
    done = {"texts": len(texts), "minutes": progress.seconds / 60, "steps": progress.step}
    return done | {"loss": progress.best, "curve": progress.curve}

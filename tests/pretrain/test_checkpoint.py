"""Checkpoints: whole or passed over by name; a full disk; a NaN; weights that come back bit for bit."""

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.checkpoint import CheckpointWriter, TrainerState

from .runs import STEPS, Bench, Outcome, losses, state_bytes

pytestmark = pytest.mark.timeout(300)


def test_damaged_checkpoints_are_passed_over(bench: Bench, continued: dict[str, Outcome]) -> None:
    """Step 30 renamed, 20 cut short, 15 with a flipped byte: the run goes on from 10 and ends as it would have."""
    assert continued["damaged"] == [0]
    run = bench.folder / "damaged"
    log = (run / "train.log").read_text()
    for name, problem in (
        ("global_step30", "manifest.json is of another checkpoint"),
        ("global_step20", "optimizer.safetensors has"),
        ("global_step15", "model.safetensors does not match its sha256"),
        (".global_step25.123.partial", "never finished"),
    ):
        lines = [line for line in log.splitlines() if f"{name} " in line and problem in line]
        assert len(lines) == 1, (name, log)
    assert "continuing from" in log and "global_step10\n" in log
    assert losses(run) == losses(bench.folder / "reference")
    assert state_bytes(run, STEPS) == state_bytes(bench.folder / "reference", STEPS)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.fixture
def some(bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path) -> Path:
    """A copy of the reference run's checkpoints."""
    return Path(shutil.copytree(bench.folder / "reference" / "checkpoints", tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "flipped"])
def test_any_damage_is_seen(some: Path, name: str, how: str) -> None:
    path = some / "global_step20" / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = data.index(b'"sha256"') + 15 if name == "manifest.json" else len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "short": data[: len(data) // 2], "flipped": flipped}[how])
    assert checkpoint.damage(some / "global_step20") is not None
    assert checkpoint.newest_complete(some) == some / "global_step15"


def test_nothing_whole_is_an_error(some: Path) -> None:
    for path in some.iterdir():
        (path / "trainer.json").unlink()
    with pytest.raises(UserError, match="no checkpoint there is whole"):
        checkpoint.find_start(some)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.find_start(tmp_path / "checkpoints") is None


def test_other_codes_and_data_are_refused(some: Path) -> None:
    values = json.loads((some / "global_step20" / "trainer.json").read_text())
    now = TrainerState(codes_sha256=values["codes_sha256"], data_fingerprint=values["data_fingerprint"])
    assert checkpoint.read_matching_state(some / "global_step20", now).step == STEPS
    with pytest.raises(UserError, match="other codes"):
        checkpoint.read_matching_state(some / "global_step20", TrainerState(data_fingerprint=now.data_fingerprint))
    with pytest.raises(UserError, match="other data"):
        checkpoint.read_matching_state(some / "global_step20", TrainerState(codes_sha256=now.codes_sha256))


def test_keep_last(bench: Bench, one_rank: dict[str, Outcome]) -> None:
    found = [checkpoint.step_of(path) for path in checkpoint.checkpoints(bench.folder / "reference" / "checkpoints")]
    assert found == [20, 15, 10, 5]
    assert (bench.folder / "reference" / "LATEST").read_text() == "global_step20\n"


def test_a_full_disk_ends_in_one_line(bench: Bench, one_rank: dict[str, Outcome]) -> None:
    run = bench.copy("reference", "full-disk", 10)
    before = state_bytes(run, 10)
    size = 1_500_000  # the weights are larger, the metrics smaller
    process = bench.start("full-disk", limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    _, log = process.communicate(timeout=200)
    assert process.returncode == 2, log
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in log
    assert "global_step15: cannot be written" in errors[0] and "File too large" in errors[0]
    assert f"the last good checkpoint is {run / 'checkpoints' / 'global_step10'}" in errors[0]
    assert state_bytes(run, 10) == before
    assert not list((run / "checkpoints").glob(".*"))


def test_nan_on_one_rank_stops_all(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    """The fourth forward pass after step 10 is a NaN on rank 1 alone."""
    first, second = two_ranks["nan"]
    assert first == second
    assert isinstance(first, str)
    assert first.startswith("step 14: the loss is not finite on rank 1; stopped before the update")
    assert str(bench.folder / "nan" / "checkpoints" / "global_step10") in first
    assert len(losses(bench.folder / "nan")) == 13


def test_a_damaged_newer_one_takes_no_place_among_those_kept(some: Path) -> None:
    """Passed over at the start, it is newer than what is written next."""
    import torch

    newest = max(some.iterdir(), key=checkpoint.step_of)
    (newest / "model.safetensors").write_bytes(b"")
    step = checkpoint.step_of(newest) - 1
    state = dataclasses.replace(TrainerState(codes_sha256="", data_fingerprint=""), step=step)
    writer = CheckpointWriter(None, some, keep_last=1)
    writer._write_or_explain({"weight": torch.zeros(2)}, state)
    assert checkpoint.newest_complete(some) == some / f"global_step{step}"
    assert {path.name for path in some.iterdir()} == {newest.name, f"global_step{step}"}


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(
    bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path
) -> None:
    """The last checkpoint is on the disk before the last evaluation is."""
    run = Path(shutil.copytree(bench.folder / "reference", tmp_path / "run"))
    whole = (run / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (run / "evaluation.jsonl").write_text("".join(whole[:-1]))
    for _ in range(2):  # the second time nothing is left to do
        process = bench.start("reference", out=run)
        assert process.wait() == 0, process.communicate()
        assert (run / "evaluation.jsonl").read_text().splitlines(keepends=True) == whole

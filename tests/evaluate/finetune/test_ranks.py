"""Ranks of a fine-tuning job: each has a GPU of its own, beside those of the other workers of its machine."""

from pathlib import Path

import pytest
import torch

from ksub_ds.common.errors import RunFailed, UserError
from ksub_ds.evaluate.finetune import ranks


@pytest.mark.parametrize(
    ("gpus", "per_job", "places"), [(4, 2, [[0, 1], [2, 3]]), (3, 2, [[0, 1], [2, 0]]), (2, 2, [[0, 1], [0, 1]])]
)
def test_ranks_of_two_workers_take_gpus_side_by_side(
    gpus: int, per_job: int, places: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for worker, wanted in enumerate(places):
        monkeypatch.setenv("KSUB_WORKER", str(worker))
        assert [ranks.place_on_machine(rank, per_job) for rank in range(per_job)] == wanted


def test_without_a_gpu_they_are_numbered_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSUB_WORKER", "3")
    assert [ranks.place_on_machine(rank, 2) for rank in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "error", "codes"),
    [
        ("sleep 1; exit 70", "kill -9 $$", RunFailed, "70, -9"),  # the watchdog of rank 0 has its time to report
        ("exec sleep 60", "exit 1", RunFailed, "-15, 1"),
        ("exec sleep 60", "exit 2", UserError, "-15, 2"),
    ],
)
def test_only_a_ranks_own_mistake_is_the_users(
    rank_0: str, rank_1: str, error: type[Exception], codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With code 2 launch/evaluate.sh ends all workers, since each would make the same mistake."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nif [ $RANK = 0 ]; then {rank_0}; fi\n{rank_1}\n")
    program.chmod(0o755)
    monkeypatch.setattr(ranks.sys, "executable", str(program))
    monkeypatch.setattr(ranks, "REPORT_SECONDS", 3.0)
    task = ranks.RankTask("xnli", {}, "model", "folder", "finetune-seed0")
    with pytest.raises(error, match=f"^finetune-seed0: its 2 ranks ended with exit codes {codes}; their"):
        ranks.train_on_ranks(task, tmp_path, 2, lambda: None)

"""Ranks of a fine-tuning job: each has a GPU of its own, beside those of the other workers of its machine."""

import pytest
import torch

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

"""What is told of a GPU, seen from a CPU: peak rates by name, out of memory, and settings that are put back."""

import os

import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.common.gpu import deterministic_algorithms, device_name, is_out_of_memory, out_of_memory_is_told, peak_bf16


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_peak_rates(name: str, tflops: float | None) -> None:
    assert peak_bf16(name) == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert peak_bf16(f"{name}, 80 GiB") == peak_bf16(name), "as `device_name` tells it"


def test_the_end_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    wrapped = ValueError("the backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert all(map(is_out_of_memory, (real.value, torch.OutOfMemoryError("CUDA out of memory."), wrapped)))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(UserError, match=r"^out of memory on cpu: take less$"), out_of_memory_is_told("take less"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_is_told("take less"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert device_name() == "cpu"


def test_deterministic_algorithms_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")

    def state() -> tuple:
        names = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
        cudnn = torch.backends.cudnn
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        fill = torch.utils.deterministic.fill_uninitialized_memory
        values = (cudnn.deterministic, cudnn.benchmark, fill, inductor.deterministic)
        return (*flags, *values, *map(os.environ.get, names))

    before = state()
    with deterministic_algorithms(False):
        assert state() == before
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert state() == (True, False, True, False, False, True, ":4096:8", "1")
        raise KeyError
    assert state() == before

"""What a GPU is and does: its peak rate and memory, the end of its memory, results that are the same bit for bit."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.rank_env import device, has_gpu

# Dense bf16 operations a second of NVIDIA's data sheets, in TFLOP/s, with fp32 sums. The name of a device must have all
# the words; the first row that fits counts.
PEAK_BF16 = (
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H200", "NVL"), 835.0),
    (("GH200",), 989.4),
    (("H200",), 989.4),
    (("H100",), 989.4),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("RTX", "6000", "Ada"), 364.2),
    (("RTX", "A6000"), 154.8),
    (("RTX", "5090"), 209.5),
    (("RTX", "4090"), 165.2),
    (("RTX", "3090"), 71.0),
)
OUT_OF_MEMORY = (
    "CUDA error: out of memory",  # outside torch's own allocator: another process has the rest
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def peak_bf16(name: str) -> float | None:
    """Return the peak rate in bf16 of the device with this name, operations a second; None if it is not known."""
    words = set(re.split(r"[\s,-]+", name))
    if words & {"Laptop", "MIG", "Max"}:  # a part of that device, or a slower one
        return None
    found = next((peak for wanted, peak in PEAK_BF16 if words.issuperset(wanted)), None)
    return None if found is None else found * 1e12


def device_name() -> str:
    """Return name and memory of this process's device: "NVIDIA H200, 140 GiB", or "cpu"."""
    if not has_gpu():
        return "cpu"
    import torch

    properties = torch.cuda.get_device_properties(device())
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, says that memory has run out."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(text in str(seen) for text in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__
    return False


@contextlib.contextmanager
def out_of_memory_is_told(advice: str) -> Iterator[None]:
    """Turn the end of memory inside the `with` block into one line.

    Args:
        advice: what was too much, and what to try.

    Yields:
        Nothing.

    Raises:
        UserError: on this rank, memory has run out.
        RuntimeError: any other one, as it was.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device_name()}: {advice}") from None


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have torch compute the same bits from the same numbers every time, inside the `with` block.

    Without it a GPU adds in whatever order its blocks finish: the backward passes of flash and memory-efficient
    attention do. On a CPU every sum has one order already.

    Args:
        wanted: False changes nothing.

    Yields:
        Nothing; afterwards all is as it was before, for what this process does next.
    """
    if not wanted:
        yield
        return
    import torch
    import torch.utils.deterministic
    from torch._inductor import config as inductor

    with contextlib.ExitStack() as before:
        # cuBLAS reads it at this process's first product; flash-attn, called by transformers, at each backward pass.
        for name, value in (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("FLASH_ATTENTION_DETERMINISTIC", "1")):
            before.callback(_restore_variable, name, os.environ.get(name))
            os.environ[name] = value
        before.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True)  # not warn_only: only so does memory-efficient attention obey
        settings: tuple[tuple[Any, str, bool], ...] = (
            (torch.backends.cudnn, "deterministic", True),
            (torch.backends.cudnn, "benchmark", False),
            (torch.utils.deterministic, "fill_uninitialized_memory", False),  # a check of torch's, at a price
            (inductor, "deterministic", True),  # its choice of kernels would be by their times
        )
        for owner, key, on in settings:
            if hasattr(owner, key):
                before.callback(setattr, owner, key, getattr(owner, key))
                setattr(owner, key, on)
        yield


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value

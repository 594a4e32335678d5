"""The forms that the loss has on a device: torch's products, and what it chooses by itself, which may be fused."""

import contextlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch

FUSED = "ksub_ds.contraction.fused"
Form = Callable[[], AbstractContextManager]


def forms(device: str) -> dict[str, Form]:
    """Return what to enter around the making of a layer and the calls of its loss, for each form that it has here."""
    if importlib.util.find_spec(FUSED) is None:
        return {"torch": contextlib.nullcontext}
    from ksub_ds.contraction.fused import why_not_here

    torch_only = {"torch": _without_kernels}
    return torch_only if why_not_here(torch.device(device)) else torch_only | {"chosen": contextlib.nullcontext}


def _without_kernels() -> AbstractContextManager:
    return mock.patch("ksub_ds.contraction.code_structure.why_not_here", return_value="not wanted")

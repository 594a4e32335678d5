"""Float32 products that stay float32, whatever precision the rest of a model runs in."""

import contextlib
from collections.abc import Iterator

import torch

TF32_DEVICES = {"cuda"}  # whose products `torch.backends.cuda.matmul` rules


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast rounds nothing.

    Where autocast is off (or unknown, as on the meta device) the context is empty: exported graphs stay plain.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute float32 products as such: neither autocast nor TF32 rounds their factors.

    In a graph of torch.compile, which cannot hold that setting, TF32 stays as it is.

    Args:
        device: of the products.

    Yields:
        Nothing.
    """
    matmul = torch.backends.cuda.matmul
    with without_autocast(device):
        # Dynamo stops at the second condition. The new name is read and written also where the old ones were set.
        if device.type not in TF32_DEVICES or torch.compiler.is_compiling() or matmul.fp32_precision != "tf32":
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "tf32"

"""What the machine can do at best: matrix products by precision, copying, launching; and what is installed."""

import contextlib
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import measuring
import torch
from trip import Row, Trip, Variants

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "liger-kernel", "cut-cross-entropy")
PRODUCTS = {
    "bf16": (torch.bfloat16, False, 1),  # type, TF32 allowed, by how much the side is shorter
    "tf32": (torch.float32, True, 1),
    "fp32": (torch.float32, False, 2),
    "fp64": (torch.float64, False, 2),
}


def variants(trip: Trip) -> Variants:
    yield "machine", describe
    for name, (dtype, tf32, shorter) in PRODUCTS.items():
        yield f"{name} product", partial(product, trip, dtype, tf32, (256 if trip.rehearsal else 8192) // shorter)
    yield "copy", partial(copy, trip)
    yield "launch", partial(launch, trip)


def describe() -> Row:
    row = measuring.machine() | {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            row[name] = version(name)
    return row


def product(trip: Trip, dtype: torch.dtype, tf32: bool, side: int) -> Row:
    """A square product, large enough that nothing but the arithmetic counts."""
    left, right = (torch.randn(side, side, device=trip.device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        milliseconds = trip.milliseconds(lambda: left @ right, 0.3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"side": side, "ms": milliseconds, "tflops": round(2 * side**3 / milliseconds / 1e9, 2)}


def copy(trip: Trip) -> Row:
    source = torch.randn(2**20 if trip.rehearsal else 2**29, device=trip.device)
    target = torch.empty_like(source)
    milliseconds = trip.milliseconds(lambda: target.copy_(source), 0.3)
    return {"ms": milliseconds, "terabytes_per_second": round(2 * source.nbytes / milliseconds / 1e9, 3)}


def launch(trip: Trip) -> Row:
    """The host's time to start a kernel that does nothing, in eager mode."""
    one, count = torch.ones(1, device=trip.device), 2000
    one.add_(1)  # the first call loads the kernel
    trip.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        one.add_(1)
    return {"microseconds": round((time.perf_counter() - start) / count * 1e6, 2)}

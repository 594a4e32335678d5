"""Time and memory of the loss, forward and backward; then of the dense decoder and of other exact losses that fuse it.

A dense variant takes fewer rows than ours do (its logits would not fit), and its time is scaled to all.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from forms import Form, forms
from loss import OURS, PLAIN, Options, step_of
from torch import Tensor
from trip import Row, Trip, Variants

WIDTH = 512
ROWS = (4915, 20_000)  # of a micro-batch of 64 sequences, and the size that the peers are compared at
DENSE_ROWS = 4096


def variants(trip: Trip) -> Variants:
    sizes = (16,) if trip.rehearsal else ROWS
    *others, (last, enter) = forms(trip.device).items()  # what the loss chooses here comes first
    for rows in sizes:
        for name in OURS | PLAIN:
            yield f"{name}, {rows} rows, {last} form", partial(ours, trip, name, rows, enter)
    rows = sizes[-1]
    few = 16 if trip.rehearsal else DENSE_ROWS
    for name, loss in PEERS.items():
        if trip.device == "cpu" and not name.startswith("dense"):
            continue  # the others need a GPU
        taken = few if name.startswith("dense") else rows
        yield (
            f"{name}, {rows} rows" + f" (scaled from {taken})" * (taken < rows),
            partial(peer, trip, loss, taken, rows),
        )
    for form, enter in others:
        for name in OURS:
            yield f"{name}, {rows} rows, {form} form", partial(ours, trip, name, rows, enter)


def ours(trip: Trip, name: str, rows: int, enter: Form) -> Row:
    options = Options(positions=rows, tokens=trip.tokens, device=trip.device)
    with enter():
        step = step_of(name, options, waits=False)
        return {"ms": trip.milliseconds(step), "extra_mb": trip.extra_megabytes(step)}


def peer(trip: Trip, loss: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, all_rows: int) -> Row:
    """The decoder in bf16, as a training under autocast has it."""
    weight = (0.02 * torch.randn(trip.tokens, WIDTH, device=trip.device)).bfloat16().requires_grad_()
    hidden = torch.randn(rows, WIDTH, device=trip.device).bfloat16().requires_grad_()
    labels = torch.randint(trip.tokens, (rows,), device=trip.device)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    milliseconds, memory, scale = trip.milliseconds(step, 1.0), trip.extra_megabytes(step), all_rows / rows
    return {"ms": round(milliseconds * scale, 4), "extra_mb": None if memory is None else round(memory * scale, 1)}


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, filter_eps: str | None) -> Tensor:
    """Without a filter (None) exact; with its default it drops gradients too small for bf16."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, filter_eps=filter_eps, impl="cce")


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense bf16": dense,
    "cut-cross-entropy filtered": partial(cut_cross_entropy, filter_eps="high"),
    "cut-cross-entropy exact": partial(cut_cross_entropy, filter_eps=None),
    "liger-kernel": liger,
}

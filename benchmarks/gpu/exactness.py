"""Loss and gradients of the project against dense float64 on the device, in every form that the loss has there."""

from functools import partial

import torch
from forms import Form, forms
from loss import OURS, clustered, error_cases, measure_error
from trip import Row, Trip, Variants

from ksub_ds import CodeTable, SubEmbedding, factorized_cross_entropy, plain_codes, positional_codes

REHEARSED_BY_INTERPRETER = ("full size", "128 x 128 leaves, Zipf")  # which takes seconds for each


def variants(trip: Trip) -> Variants:
    width = 96 if trip.rehearsal else 512
    cases = {name: partial(case) for name, case in error_cases(trip.device, trip.tokens, width).items()}
    for name, table in code_kinds(trip.tokens).items():
        rows = 32 if trip.rehearsal else 512
        for bias in ("no bias", "Zipf bias"):  # a normal one is among error_cases
            cases[f"{name}, {bias}, {rows} rows"] = partial(
                measure_error, table, rows, width, bias != "no bias", 3.0, zipf=bias == "Zipf bias", device=trip.device
            )
    if trip.rehearsal:
        cases = {name: case for number, (name, case) in enumerate(cases.items()) if number % 4 == 0}
    rows = 256 if trip.rehearsal else 20_000
    cases[f"gradient of a Zipf bias, {rows} rows"] = partial(bias_gradient_error, trip, rows, width)
    for form, enter in reversed(forms(trip.device).items()):  # first what the loss chooses by itself
        for name, case in cases.items():
            if trip.rehearsal and form == "chosen" and not name.startswith(REHEARSED_BY_INTERPRETER):
                continue
            yield f"{name}, {form} form", partial(error, case, enter)


def bias_gradient_error(trip: Trip, rows: int, width: int, chunk: int = 256) -> Row:
    """Measure the bias's gradient over as many rows as a step has, where errors of one direction add up.

    Near the start of a training: labels as frequent as exp(bias) says, small scores.
    """
    generator = torch.Generator().manual_seed(2)
    bias = -torch.log(torch.randperm(trip.tokens, generator=generator) + 1.0)
    labels = torch.multinomial(bias.exp(), rows, replacement=True, generator=generator).to(trip.device)
    hidden = torch.randn(rows, width, generator=generator).to(trip.device)
    layer = SubEmbedding(clustered(trip.tokens), width).to(trip.device)
    bias = bias.to(trip.device).requires_grad_()
    factorized_cross_entropy(hidden, layer, labels, bias, reduction="sum").backward()
    with torch.no_grad():
        weight = layer.dense_weight().double()
        exact = -torch.bincount(labels, minlength=trip.tokens).double()
        total = torch.zeros_like(exact)
        for some in hidden.double().split(chunk):
            total += torch.addmm(bias.double(), some, weight.t()).softmax(dim=1).sum(dim=0)
    assert bias.grad is not None
    error = bias.grad.double() - (exact + total)
    relative, direction = (error.norm() / (exact + total).norm()).item(), (error.sum() / total.sum()).item()
    return {"gradient_error": relative, "mean_error": direction, "ok": relative <= 5e-6}


def code_kinds(tokens: int) -> dict[str, CodeTable]:
    """Codes of every kind a run can have."""
    tables = {name: make(tokens) for name, (make, with_bias, _) in OURS.items() if not with_bias}
    tables |= {f"positional K = {k}": positional_codes(tokens, k) for k in (2, 4)}
    tables["positional, special tokens apart"] = positional_codes(tokens, 3, special_ids=(0, 1, 2, 3, tokens - 1))
    return tables | {"plain": plain_codes(tokens)}


def error(case: partial, enter: Form) -> Row:
    torch.manual_seed(0)
    with enter():
        return case()

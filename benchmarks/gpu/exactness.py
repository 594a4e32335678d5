"""Loss and gradients of the project against dense float64 on the device, in every form that the loss has there."""

from functools import partial

import torch
from forms import Form, forms
from loss import OURS, error_cases, measure_error
from trip import Row, Trip, Variants

from ksub_ds import CodeTable, plain_codes, positional_codes

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
    for name, case in cases.items():
        for form, enter in forms(trip.device).items():
            if trip.rehearsal and form == "chosen" and not name.startswith(REHEARSED_BY_INTERPRETER):
                continue
            yield f"{name}, {form} form", partial(error, case, enter)


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

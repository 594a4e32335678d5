"""A training step's forward and backward without the engine: over micro-batches, eager and compiled; and its profile.

The weights are float32 and the products bf16, by autocast, as in `ksub pretrain --precision bf16`.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loss import clustered
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from trip import Row, Trip, Variants

from ksub_ds.corpus import masking
from ksub_ds.model.presets import fresh_model, preset_config
from ksub_ds.pretrain.builders import set_dropout

MICRO_BATCHES = (64, 128, 256)
MASKED = 0.15
STEP = "the profiled step"
HOST_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "_local_scalar_dense", "aten::nonzero")


def variants(trip: Trip) -> Variants:
    for sequences in (2,) if trip.rehearsal else MICRO_BATCHES:
        for how in ("eager", "compiled"):
            yield f"micro-batch {sequences} {how}", partial(cost, trip, sequences, how, dropout=0.1)
    largest = 2 if trip.rehearsal else MICRO_BATCHES[-1]
    yield f"micro-batch {largest} compiled, no dropout", partial(cost, trip, largest, "compiled", dropout=0.0)


def cost(trip: Trip, sequences: int, how: str, dropout: float) -> Row:
    start = time.perf_counter()
    model, inputs = model_of(trip, how, dropout), batch(trip, sequences)

    def encoder() -> None:
        with autocast(trip):
            states = model.base_model(inputs["input_ids"], attention_mask=None, return_dict=True).last_hidden_state
        states.float().sum().backward()

    whole = forward_and_backward(trip, model, inputs)
    whole()
    first = time.perf_counter() - start
    milliseconds = trip.milliseconds(whole, 1.0)
    tokens = inputs["input_ids"].numel()
    return {
        "ms": milliseconds,
        "encoder_ms": trip.milliseconds(encoder, 1.0),
        "tokens_per_second": round(1e3 * tokens / milliseconds),
        "first_seconds": round(first, 1),
        "extra_mb": trip.extra_megabytes(whole),
    }


def forward_and_backward(trip: Trip, model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def call() -> None:
        with autocast(trip):
            loss = model(**inputs, loss_reduction="sum").loss
        loss.backward()

    return call


def autocast(trip: Trip) -> torch.autocast:
    return torch.autocast(trip.device, torch.bfloat16)


def model_of(trip: Trip, how: str, dropout: float) -> Any:
    torch.manual_seed(0)
    model = fresh_model(preset_config(trip.preset, vocab_size=trip.tokens), clustered(trip.tokens))
    set_dropout(model, dropout)
    model.to(trip.device).train()
    if how == "compiled":
        torch.compiler.reset()
        model.base_model.compile(fullgraph=True, dynamic=False, backend="eager" if trip.rehearsal else "inductor")
    return model


def batch(trip: Trip, sequences: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, trip.tokens, (sequences, trip.length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < MASKED, ids, -100)
    positions, targets = masking.masked_positions(labels.numpy(), masking.padded_count(labels.numel(), MASKED))
    inputs = {
        "input_ids": ids,
        "masked_positions": torch.from_numpy(positions),
        "targets": torch.from_numpy(targets),
    }
    return {name: tensor.to(trip.device) for name, tensor in inputs.items()}


# ------------------------------------------------------------------------------------------------ where the time goes


def profile_variants(trip: Trip) -> Variants:
    sequences = 2 if trip.rehearsal else MICRO_BATCHES[-1]
    for how in ("eager", "compiled"):
        yield f"micro-batch {sequences} {how}", partial(profiled, trip, sequences, how)


def profiled(trip: Trip, sequences: int, how: str, shown: int = 25) -> Row:
    """Kernels by their time, and every event of the step in which the host waits for the device."""
    step = forward_and_backward(trip, model_of(trip, how, dropout=0.1), batch(trip, sequences))
    for _ in range(3):
        step()
    trip.synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trip.device == "cuda")
    with profile(activities=activities) as events:
        start = time.perf_counter()
        with record_function(STEP):
            step()
        trip.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    averages = events.key_averages()
    on_device = DeviceType.CUDA if trip.device == "cuda" else DeviceType.CPU  # operators repeat their kernels' times
    attribute = "self_device_time_total" if trip.device == "cuda" else "self_cpu_time_total"
    timed = [event for event in averages if event.device_type == on_device and event.key != STEP]
    by_time = sorted(timed, key=lambda event: -getattr(event, attribute))
    busy = sum(getattr(event, attribute) for event in timed) / 1e3
    waits = waits_of_step(events)
    kernels = {event.key[:90]: [event.count, round(getattr(event, attribute) / 1e3, 3)] for event in by_time[:shown]}
    return {
        "wall_ms": round(wall, 2),
        "busy_ms": round(busy, 2),
        "waits": sum(waits.values()),
        "host_waits": waits,
        "count_and_ms": kernels,
    }


def waits_of_step(events: profile) -> Counter[str]:
    """Return the waits that begin while the host is in the step; the profile itself ends with one."""
    all_events = events.events()
    step = next(event for event in all_events if event.name == STEP and event.device_type == DeviceType.CPU).time_range
    return Counter(
        event.name
        for event in all_events
        if any(name in event.name for name in HOST_WAITS) and step.start <= event.time_range.start <= step.end
    )

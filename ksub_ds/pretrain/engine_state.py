"""The state inside DeepSpeed, parameter by parameter: fp32 master weights, Adam's moments, the loss scale.

ZeRO 1 and 2 flatten the parameters and give each rank a part of the flat vector, in fp32, with the part of Adam's
state that belongs to it. DeepSpeed links each parameter to its fragments; here they are read and written whole.
ZeRO 3 cuts each parameter into equal parts, the last one padded. Without ZeRO the parameters are their own masters.
"""

from collections.abc import Iterator
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.pretrain.engine import is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def full_shape(parameter: Any) -> Any:
    """The shape of a parameter, of which ZeRO 3 leaves an empty tensor between uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _master(engine: Any, parameter: Any, key: str) -> Any:
    """One parameter's whole fp32 master weight (key "weight") or moment, gathered from all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not engine.zero_optimization():
        return parameter.detach() if key == "weight" else engine.optimizer.state[parameter][key]
    if key == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def set_master(engine: Any, parameter: Any, key: str, value: Any) -> None:
    """Overwrite one parameter's master weight or moment; call `publish_masters` when all are set."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        _set_part(parameter, key, value)
    elif not engine.zero_optimization():
        (parameter.data if key == "weight" else engine.optimizer.state[parameter][key]).copy_(value)
    elif key == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _set_part(parameter: Any, key: str, value: Any) -> None:
    """ZeRO 3: overwrite this rank's part. DeepSpeed's own function for whole values forgets the padding."""
    import torch
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    start = min(distributed.rank() * size, value.numel())
    part = value.flatten()[start : start + size]
    part = torch.nn.functional.pad(part, (0, size - part.numel()))
    if key == "weight":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


def adam_step(engine: Any) -> int:
    """Updates Adam has made (0 before the first): one number, the same for every parameter and rank."""
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def make_adam_state(engine: Any, steps: int) -> None:
    """Give Adam the state it would have after its first step, to be overwritten: DeepSpeed makes it lazily."""
    import torch

    optimizer = engine.basic_optimizer
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if is_sharded(engine):
        tensors = engine.optimizer.fp32_partitioned_groups_flat
    for tensor in tensors:
        step = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        optimizer.state[tensor] = {"step": step} | {key: torch.zeros_like(tensor) for key in MOMENTS}
    _link_adam_state(engine)


def _link_adam_state(engine: Any) -> None:
    """Link each parameter to its slice of Adam's state.

    DeepSpeed does this once, after the first group of parameters has made its first step: the other groups
    have no state then, and stay without a link.
    """
    if engine.zero_optimization() and not is_sharded(engine):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def named_masters(engine: Any) -> Iterator[tuple[str, Any]]:
    """Every weight and moment as (file key, fp32 tensor). A collective: all ranks must iterate to the end."""
    keys: tuple[str, ...] = ("weight",)
    if adam_step(engine):
        _link_adam_state(engine)
        keys += MOMENTS
    for name, parameter in engine.module.named_parameters():
        for key in keys:
            yield (name if key == "weight" else f"{key}.{name}"), _master(engine, parameter, key)


def publish_masters(engine: Any) -> None:
    """Copy the master weights into the (half precision) weights the model computes with, on every rank."""
    optimizer = engine.optimizer
    if is_sharded(engine):
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif engine.zero_optimization():
        optimizer.update_lp_params()


def loss_scaler_state(engine: Any) -> dict[str, float] | None:
    """fp16's dynamic loss scale and its counters; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in LOSS_SCALER_KEYS}


def set_loss_scaler(engine: Any, state: dict[str, float]) -> None:
    """Undo `loss_scaler_state`."""
    for key in LOSS_SCALER_KEYS:
        setattr(engine.optimizer.loss_scaler, key, state[key])

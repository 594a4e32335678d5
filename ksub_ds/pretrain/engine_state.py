"""The state inside DeepSpeed, parameter by parameter: fp32 master weights, Adam's moments, the loss scale.

ZeRO 1 and 2 flatten the parameters and give each rank a part of the flat vector, in fp32, with the part of Adam's
state that belongs to it; DeepSpeed links each parameter to its fragments.
ZeRO 3 cuts each parameter into equal parts, the last one padded. Without ZeRO the parameters are their own masters.
"""

from typing import TYPE_CHECKING, Any

from ksub_ds.common import distributed
from ksub_ds.pretrain.engine import is_sharded

if TYPE_CHECKING:  # deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def full_shape(parameter: Any) -> Any:
    """Return the shape of a whole parameter, of which ZeRO 3 leaves an empty tensor between uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def set_master(engine: "DeepSpeedEngine", parameter: Any, key: str, value: Any) -> None:
    """Overwrite one parameter's master weight or moment; call `publish_masters` when all are set.

    Args:
        engine: the engine that trains it.
        parameter: of the engine's model.
        key: "weight", or one of `MOMENTS`.
        value: the whole tensor, fp32.
    """
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
    """Overwrite this rank's part under ZeRO 3; DeepSpeed's own function for whole values ignores the padding."""
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


def adam_step(engine: "DeepSpeedEngine") -> int:
    """Return how many updates Adam has made (0 before the first), the same for every parameter and rank."""
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def make_adam_state(engine: "DeepSpeedEngine", steps: int) -> None:
    """Make the state that Adam would have after its first step, to be overwritten: DeepSpeed makes it lazily."""
    import torch

    optimizer = engine.basic_optimizer
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if is_sharded(engine):
        tensors = engine.optimizer.fp32_partitioned_groups_flat
    for tensor in tensors:
        step = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        optimizer.state[tensor] = {"step": step} | {key: torch.zeros_like(tensor) for key in MOMENTS}
    _link_adam_state(engine)


def _link_adam_state(engine: "DeepSpeedEngine") -> None:
    """Link each parameter to its slice of Adam's state.

    DeepSpeed does this once, after the first group of parameters has made its first step: the other groups
    have no state then, and stay without a link.
    """
    if engine.zero_optimization() and not is_sharded(engine):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def collect_masters(engine: "DeepSpeedEngine") -> dict[str, Any]:
    """Gather every weight and moment on rank 0. A collective.

    Each rank sends rank 0 the fragments that it owns, once: no rank holds more than its own share twice.

    Returns:
        Whole fp32 tensors on the CPU, by key of the checkpoint's files; empty on other ranks than 0.
    """
    import torch
    import torch.distributed as dist

    keys: tuple[str, ...] = ("weight",)
    if adam_step(engine):
        _link_adam_state(engine)
        keys += MOMENTS
    parts, places = [], []  # flat fragments, and where they belong: (key, first element, elements)
    for name, parameter in engine.module.named_parameters():
        for key in keys:
            start, fragment = _own_fragment(engine, parameter, key)
            if len(fragment):
                parts.append(fragment)
                places.append((name if key == "weight" else f"{key}.{name}", start, len(fragment)))
    flat = torch.cat(parts) if parts else torch.empty(0)
    all_places = distributed.gather_objects(places)
    if not distributed.is_main():
        if len(flat):
            dist.send(flat.to(distributed.device()), dst=0)
        return {}
    shapes = {name: full_shape(parameter) for name, parameter in engine.module.named_parameters()}
    whole = {
        (name if key == "weight" else f"{key}.{name}"): torch.empty(shape)
        for name, shape in shapes.items()
        for key in keys
    }
    for rank, theirs in enumerate(all_places):
        if rank > 0:
            flat = torch.empty(sum(length for _, _, length in theirs), device=distributed.device())
            if len(flat):
                dist.recv(flat, src=rank)
        for (name, start, length), fragment in zip(theirs, flat.split([place[2] for place in theirs]), strict=True):
            whole[name].view(-1)[start : start + length] = fragment
    return whole


def _own_fragment(engine: "DeepSpeedEngine", parameter: Any, key: str) -> tuple[int, Any]:
    """Return (first element, flat fp32 elements) of a parameter's master weight or moment that this rank owns."""
    import torch
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    if is_sharded(engine):
        weight = key == "weight"
        part = safe_get_local_fp32_param(parameter) if weight else safe_get_local_optimizer_state(parameter, key)
        start = distributed.rank() * len(part)
        return start, part[: max(0, parameter.ds_numel - start)]
    if engine.zero_optimization():
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(None if key == "weight" else key).flatten()
    if not distributed.is_main():
        return 0, torch.empty(0)
    return 0, (parameter.detach() if key == "weight" else engine.optimizer.state[parameter][key]).flatten()


def publish_masters(engine: "DeepSpeedEngine") -> None:
    """Copy the master weights into the (half precision) weights the model computes with, on every rank."""
    optimizer = engine.optimizer
    if is_sharded(engine):
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif engine.zero_optimization():
        optimizer.update_lp_params()


def loss_scaler_state(engine: "DeepSpeedEngine") -> dict[str, float] | None:
    """Return fp16's dynamic loss scale and its counters; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in LOSS_SCALER_KEYS}


def set_loss_scaler(engine: "DeepSpeedEngine", state: dict[str, float]) -> None:
    """Set what `loss_scaler_state` has returned."""
    for key in LOSS_SCALER_KEYS:
        setattr(engine.optimizer.loss_scaler, key, state[key])

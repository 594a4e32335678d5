"""DeepSpeed: its configuration from the recipe and a ds_configs file, its engine, its optimizer.

One owner per setting. A ds_configs file sets how state and messages are divided (ZeRO, buckets,
monitors); batch, learning rate, clipping and precision come from the recipe, and a file that names
them is refused.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksub_ds.common.distributed import to_device
from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import read_json
from ksub_ds.common.rank_env import device, world_size

if TYPE_CHECKING:  # deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

# Keys that a ds_configs file may not set, and the setting that owns each.
RECIPE_KEYS = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "optimizer": "--peak-lr, --weight-decay, --adam-beta1 ...",
    "scheduler": "--schedule, --peak-lr, --warmup-steps, --max-steps",
    "gradient_clipping": "--gradient-clipping",
    "fp16": "--precision",
    "bf16": "--precision",
    "bfloat16": "--precision",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "data_types": "--precision",
    "gradient_allreduce_op": "the loss is a global mean",
    "gradient_predivide_factor": "the loss is a global mean",
    "prescale_gradients": "the loss is a global mean",
}
OBJECT_KEYS = ("zero_optimization", "comms_logger", "tensorboard", "wandb", "csv_monitor", "flops_profiler")
# What DeepSpeed's monitors import on rank 0, only when the engine is built, and the package that has it. TensorBoard
# is on unless the file turns it off.
MONITORS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard", True), "wandb": ("wandb", "wandb", False)}
MECHANICS_KEYS = (
    *OBJECT_KEYS,
    *("communication_data_type", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
    "log_level",
)


# Elements of a bucket of gradients or weights: a fifth of the model, but not less than what a message is worth
# sending for (measured at 26M parameters, docs/scaling.md), and not more than the model.
LEAST_BUCKET = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 100_000_000}
LEAST_BUCKET_STAGE_3 = {"reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 5_000_000}
LARGEST_BUCKET = 100_000_000  # 0.4 GB in fp32
AUTO = "auto"


def find_deepspeed_config(name: str) -> Path:
    """Return the JSON file that --deepspeed names: a path, or a name in ds_configs/.

    ds_configs/ lies in the source tree; an installation has it under sys.prefix/share/ksub_ds.

    Raises:
        UserError: there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    places = (Path(__file__).resolve().parents[2] / "ds_configs", Path(sys.prefix) / "share" / "ksub_ds" / "ds_configs")
    folder = next((place for place in places if place.is_dir()), places[0])
    if re.fullmatch(r"\w+", name) and (folder / f"{name}.json").is_file():
        return folder / f"{name}.json"
    known = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
    raise UserError(f"--deepspeed {name}: no such file, and no such name in {folder} (there: {known})")


def read_mechanics(path: Path) -> dict[str, Any]:
    """Read and check a ds_configs file.

    Raises:
        UserError: not JSON, a key the recipe owns, an unknown key, no ZeRO stage, an offload this program lacks,
            "auto" where no size follows from the model's.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not a JSON object of DeepSpeed settings")
    _check_keys(config, path)
    _check_zero(config.get("zero_optimization", {}), path)
    return config


def _check_keys(config: dict[str, Any], path: Path) -> None:
    for key in config:
        if key in RECIPE_KEYS:
            raise UserError(f"{path}: key {key!r} belongs to the recipe ({RECIPE_KEYS[key]}); remove it from the file")
        if key not in MECHANICS_KEYS:
            near = difflib.get_close_matches(key, MECHANICS_KEYS, 1)
            raise UserError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for key in OBJECT_KEYS:
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {config[key]!r}, not a JSON object")


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    if zero.get("compute_grad_norm", True) is not True:
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm must be true: a step that is not finite is refused"
        )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    sized = LEAST_BUCKET_STAGE_3 if stage == 3 else LEAST_BUCKET
    for key, value in zero.items():
        if value == AUTO and key not in sized:
            names = ", ".join(sized)
            raise UserError(f'{path}: zero_optimization.{key} is "auto"; at stage {stage} only {names} can be')
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        offload = zero.get(key)
        if offload is None:
            continue
        if stage not in stages:
            raise UserError(f"{path}: zero_optimization.{key} needs stage {' or '.join(map(str, stages))}, not {stage}")
        if not isinstance(offload, dict) or offload.get("device", "none") not in ("cpu", "none"):
            raise UserError(f'{path}: zero_optimization.{key} must be {{"device": "cpu"}} (no NVMe here)')
        if offload.get("ratio", 1.0) != 1.0:
            raise UserError(f"{path}: zero_optimization.{key}.ratio must be 1.0: all of the state in one place")


def check_monitors(config: dict[str, Any], path: Path) -> None:
    """Import what the monitors of a ds_configs file will need.

    Args:
        config: content of the file.
        path: the file, for the message.

    Raises:
        UserError: a package is missing, or one that it needs is too old or too new for it.
    """
    for key, (module, package, by_default) in MONITORS.items():
        if not config.get(key, {"enabled": by_default}).get("enabled", False):
            continue
        off = f'or write "{key}": {{"enabled": false}} into {path}'
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{path}: {key} needs the package {package}: pip install {package}; {off}")
        try:
            importlib.import_module(module)
        except Exception as error:  # an old protobuf raises TypeError, ImportError or AttributeError by its version
            reason = f"{type(error).__name__}: {one_line(error)}"
            try:
                protobuf = f"protobuf {importlib.metadata.version('protobuf')}"
            except importlib.metadata.PackageNotFoundError:
                protobuf = "no protobuf"
            raise UserError(
                f"{path}: {key}: the package {package} cannot be imported with {protobuf} ({reason}); "
                f"pip install --upgrade protobuf {package}; {off}"
            ) from error


def zero_stage(config: dict[str, Any]) -> Any:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return config.get("zero_optimization", {}).get("stage", 0)


def size_buckets(mechanics: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Replace each "auto" of a ds_configs file by a size that follows from the model's.

    Args:
        mechanics: content of the file; it is not changed.
        parameters: elements of all trainable parameters; buckets are counted in elements too.
    """
    zero = dict(mechanics.get("zero_optimization", {}))
    least = LEAST_BUCKET_STAGE_3 if zero_stage(mechanics) == 3 else LEAST_BUCKET
    for key in [key for key, value in zero.items() if value == AUTO]:
        size = min(parameters, LARGEST_BUCKET, max(least[key], parameters // 5))
        zero[key] = -(-size // 8) * 8  # DeepSpeed wants the parts of messages to begin at even places
    return {**mechanics, "zero_optimization": zero} if zero else mechanics


def check_precision(mechanics: dict[str, Any], precision: str) -> None:
    """Refuse fp16 weights without the ZeRO stages that keep fp32 master weights; in bf16 all weights are fp32.

    Raises:
        UserError: stage 0 and fp16.
    """
    if precision == "fp16" and zero_stage(mechanics) == 0:
        raise UserError(
            "--precision fp16 with ZeRO stage 0 keeps no fp32 master weights this program could save; "
            "use --deepspeed zero1, or --precision bf16"
        )


def compose_config(
    mechanics: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    precision: str,
    gradient_clipping: float,
    tensorboard: Path | None = None,
) -> dict[str, Any]:
    """Compose the whole DeepSpeed configuration: the mechanics of a ds_configs file, the rest from the recipe.

    Args:
        mechanics: the file, with the sizes of buckets filled in.
        micro_batch_size: sequences in one forward pass of one rank.
        accumulation: micro-batches per rank and optimizer step.
        world_size: number of ranks.
        precision: "fp32", "bf16" or "fp16". To DeepSpeed bf16 is fp32: see `compute_in_bf16`.
        gradient_clipping: largest gradient norm that DeepSpeed clips to; 0 leaves it to `GuardedUpdate`.
        tensorboard: folder of the TensorBoard files; None for none.
    """
    config = dict(mechanics)
    config |= {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
        # With offload too, the optimizer is torch's: DeepSpeed's own for the CPU is compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the device before every forward pass and after every step.
        "timers": {"throughput": {"enabled": False}},
    }
    if zero_stage(mechanics) != 3:
        # Each rank's loss is already divided by the global count of predicted tokens: ranks add up.
        # Stage 3 knows the mean alone; see `loss_factor`.
        config["gradient_allreduce_op"] = "sum"
    if precision == "fp16":
        config["fp16"] = {"enabled": True}
    elif gradient_clipping == 0 and zero_stage(mechanics) in (1, 2) and not _offloads(mechanics):
        # DeepSpeed's own norm would wait for the device; it insists on it with offload, which waits anyway.
        config["zero_optimization"] = {**mechanics["zero_optimization"], "compute_grad_norm": False}
    if tensorboard is not None:
        config.setdefault("tensorboard", {"enabled": True})
        config["tensorboard"] |= {"output_path": str(tensorboard.parent), "job_name": tensorboard.name}
    return config


def _offloads(mechanics: dict[str, Any]) -> bool:
    offload = mechanics["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def build_optimizer(model: Any, peak_lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float) -> Any:
    """Build torch's AdamW over the parameters that are trained.

    Args:
        model: whose parameters.
        peak_lr: learning rate until the schedule sets another.
        betas: beta_1, beta_2.
        epsilon: of AdamW.
        weight_decay: on matrices and tables only, not on biases and LayerNorm (one-dimensional).
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak_lr, betas=betas, eps=epsilon, fused=True)


def start_engine(model: Any, optimizer: Any, config: dict[str, Any]) -> "DeepSpeedEngine":
    """Call `deepspeed.initialize` without its output. Every rank must hold the same model.

    Args:
        model: with its weights.
        optimizer: of its parameters.
        config: DeepSpeed's, as `compose_config` gives it.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    import deepspeed
    import torch
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
    from deepspeed.utils import logger
    from pydantic import ValidationError

    # Stage 3 replaces torch's linear function, with sums in another order, and leaves it so for the next run's engine.
    own_linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear)
    torch.nn.functional.linear = own_linear
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls of DeepSpeed's
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory reports
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"DeepSpeed refuses the configuration: {error.title} {where}: {first['msg']}") from error
    except ValueError as error:
        raise UserError(f"DeepSpeed refuses the configuration: {one_line(error, 300)}") from error
    # TrainingMetrics writes to the monitor; the engine would add its own events at every step.
    engine.monitor.enabled = False
    return engine


def compute_in_bf16(model: Any) -> None:
    """Make a model's forward pass compute in bf16 where that is exact enough; its weights stay as they are.

    DeepSpeed's engine ends an autocast that it finds around its forward pass on a GPU, so it has to be inside.
    """
    import torch

    model.forward = torch.autocast(device().type, torch.bfloat16)(model.forward)


def loss_factor(engine: "DeepSpeedEngine") -> int:
    """Return the factor of a rank's loss that makes gradients add up over ranks: stage 3 divides by their number."""
    return engine.dp_world_size if zero_stage(engine.config) == 3 else 1


def is_sharded(engine: "DeepSpeedEngine") -> bool:
    """Return whether a forward pass gathers weights from the other ranks, so that all of them must make it."""
    return zero_stage(engine.config) == 3


def set_learning_rate(engine: "DeepSpeedEngine", lr: float) -> None:
    """Set the rate of the next update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


class LossScaleExhausted(ArithmeticError):
    """In fp16 the gradient is not finite, even at the smallest loss scale; every rank raises it at the same step."""


class GuardedUpdate:
    """Updates the weights of an engine unless the loss or the gradient is not finite: the device itself decides.

    torch's fused AdamW looks at `found_inf`, a number on the device; where it is 1, weights, moments and count of
    steps stay as they are. Once 1 it stays 1, so that the steps launched before the host learns of it change nothing
    either. In fp16 DeepSpeed measures, clips and passes over gradients that are not finite: it halves its loss scale.

    Args:
        engine: the engine; with its configuration's `gradient_clipping` 0 unless it computes in fp16.
        gradient_clipping: largest gradient norm; 0 clips nothing.
    """

    def __init__(self, engine: "DeepSpeedEngine", gradient_clipping: float):
        self._engine, self._clipping = engine, gradient_clipping
        self._fp16 = engine.fp16_enabled()
        self._on_host = bool(engine.zero_optimization() and engine.zero_cpu_offload())
        self._found_inf = engine.basic_optimizer.found_inf = to_device([0.0]).float().squeeze(0)

    def squared_gradient_norm(self) -> "Tensor":
        """Return this rank's part of the squared norm of the reduced gradient, float64: the parts add up."""
        import torch

        if self._fp16:
            return to_device([0.0]).squeeze(0)
        norms = torch.stack(torch._foreach_norm(self._gradients(), 2, torch.float64)).to(device())
        return norms.square().sum() / (1 if self._engine.zero_optimization() else world_size())

    def launch(self, loss: "Tensor", squared_norm: "Tensor", rate: float) -> "Tensor":
        """Clip the gradient and update the weights, if both numbers, which are those of all ranks, are finite.

        Args:
            loss: of the step; its sum will do.
            squared_norm: sum of the ranks' `squared_gradient_norm`.
            rate: learning rate.

        Returns:
            The norm of the gradient before clipping, a float64 tensor; in fp16 infinite when DeepSpeed skipped it.

        Raises:
            LossScaleExhausted: DeepSpeed cannot halve its loss scale once more.
        """
        import torch

        norm = squared_norm.sqrt()
        self._found_inf.copy_(torch.maximum(self._found_inf, (~torch.isfinite(loss + norm)).float()))
        if self._on_host:  # Adam's own copy to the host would be read before it arrives
            self._engine.basic_optimizer.found_inf = self._found_inf.cpu()
        if self._clipping and not self._fp16:
            gradients = self._gradients()
            factor = 1.0 / ((norm.float() + 1e-6) / self._clipping).clamp(min=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        set_learning_rate(self._engine, rate)
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):  # DeepSpeed has no type of its own for it
                raise LossScaleExhausted from error
            raise
        if self._fp16:
            return to_device([float(self._engine.get_global_grad_norm())]).squeeze(0)
        return norm

    def _gradients(self) -> "list[Tensor]":
        """Return this rank's part of the reduced gradients; without ZeRO all of them."""
        from deepspeed.accelerator import get_accelerator

        engine, optimizer = self._engine, self._engine.optimizer
        if not engine.zero_optimization():
            return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if self._on_host:
            get_accelerator().synchronize()  # the copies to the host
            masters = "fp32_partitioned_groups_flat" if is_sharded(engine) else "single_partition_of_fp32_groups"
            return [master.grad for master in getattr(optimizer, masters)]
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]


def loss_scale(engine: "DeepSpeedEngine") -> float | None:
    """Return fp16's current loss scale; None in other precisions."""
    return float(engine.optimizer.loss_scaler.cur_scale) if engine.fp16_enabled() else None

"""Build what the loop works on, from a resolved run: model, teacher, engine; and describe the run before step 1."""

import importlib.util
import math
import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.gpu import device_name, is_out_of_memory, peak_bf16
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import log_frequency
from ksub_ds.corpus.tokenizers.loading import Tokenizer
from ksub_ds.pretrain.engine import (
    build_optimizer,
    compose_config,
    compute_in_bf16,
    size_buckets,
    start_engine,
    zero_stage,
)
from ksub_ds.pretrain.engine_state import full_shape
from ksub_ds.pretrain.metrics import Work
from ksub_ds.pretrain.prefetch import StepBatches
from ksub_ds.pretrain.recipe import Recipe, smaller_micro_batch
from ksub_ds.pretrain.resolved_run import ResolvedRun
from ksub_ds.pretrain.warm_start import open_warm_start

# What --attention needs: a module, and how to get it.
ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build flash-attention's folder hopper"),
}

if TYPE_CHECKING:  # seconds of imports, and deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine

    from ksub_ds.model.base import TokenPredictor
    from ksub_ds.model.distillation import Teacher


def build_network(recipe: Recipe, config: Any, table: CodeTable, warm_start: Path | None = None) -> "TokenPredictor":
    """Build the language model of a recipe, with weights that follow from its seed or its warm start.

    Args:
        recipe: a resolved recipe.
        config: of the network (`network_config`).
        table: the codes.
        warm_start: folder of the warm start's model; default where the recipe says.
    """
    if recipe.warm_start is not None:
        return open_warm_start(warm_start or recipe.warm_start, table)
    import torch

    from ksub_ds.model.presets import fresh_model

    torch.manual_seed(recipe.seed)
    return fresh_model(config, table)


def build_model(run: ResolvedRun) -> "TokenPredictor":
    """Build the model to train: the network with the recipe's dropout, attention and start of the bias.

    Raises:
        UserError: the model cannot compute attention as the recipe says.
    """
    recipe = run.recipe
    model = build_network(recipe, run.config, run.table)
    if recipe.dropout is not None:
        set_dropout(model, recipe.dropout)
    set_attention(model, recipe.attention)
    if recipe.decoder_bias == "frequency":
        start_bias(model, run.dataset, recipe.alpha)
    return model


def set_dropout(model: Any, share: float) -> None:
    """Set the share that every dropout of a model drops; the configuration, which is exported, keeps its own."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        elif hasattr(module, "attention_dropout"):  # ModernBERT's: a number, and no layer behind it where that is 0
            module.attention_dropout = share
            if hasattr(module, "out_drop"):
                module.out_drop = torch.nn.Dropout(share)


def set_attention(model: Any, name: str | None) -> None:
    """Have a model compute attention by transformers' implementation of this name; None leaves the choice to it.

    Raises:
        UserError: it needs a package that is not installed, a kernel that cannot be had, or another device.
    """
    if name is None:
        return
    from_hub = ("kernels", "pip install kernels")
    module, remedy = ATTENTION_PACKAGES.get(name, from_hub if "/" in name else ("torch", ""))
    if importlib.util.find_spec(module) is None:  # transformers would go on with a kernel that it downloads
        raise UserError(f"--attention {name}: needs the module {module}: {remedy}; or leave it out")
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # of transformers, of the package, or of the connection to the Hub
        raise UserError(f"--attention {name}: {one_line(error, 300)}; or leave it out") from error


def start_bias(model: Any, dataset: ShardDataset, alpha: float) -> None:
    """Set the decoder's bias to the tokens' log frequency; with small weights the model begins as a unigram model.

    Args:
        model: whose `decoder_bias`, (N,), is set.
        dataset: opened shards.
        alpha: exponent of language smoothing.
    """
    import torch

    with torch.no_grad():
        model.decoder_bias.copy_(torch.from_numpy(log_frequency(dataset, alpha)))


def build_teacher(run: ResolvedRun) -> "Teacher | None":
    """Open the model to distil from, frozen; None without --distill-from.

    Raises:
        UserError: it cannot be read, or has other tokens.
    """
    if run.recipe.distill_from is None:
        return None
    from ksub_ds.model.distillation import Teacher

    return Teacher(run.recipe.distill_from, run.table, distributed.device())


def build_engine(run: ResolvedRun, model: Any, tensorboard: Path) -> "DeepSpeedEngine":
    """Start the DeepSpeed engine over a model.

    Args:
        run: gives batch sizes, mechanics, precision and the optimizer's settings.
        model: the model to train.
        tensorboard: folder of the TensorBoard files.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    recipe, batch = run.recipe, run.batch
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = compose_config(
        size_buckets(run.mechanics, parameters),
        micro_batch_size=batch.micro,
        accumulation=batch.accumulation,
        world_size=batch.world,
        precision=recipe.precision,
        gradient_clipping=recipe.gradient_clipping if recipe.precision == "fp16" else 0.0,  # else `GuardedUpdate` clips
        tensorboard=tensorboard,
    )
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    optimizer = build_optimizer(model, recipe.peak_lr, betas, recipe.adam_epsilon, recipe.weight_decay)
    if recipe.precision == "bf16":
        compute_in_bf16(model)
    return start_engine(model, optimizer, config)


def compile_where_possible(run: ResolvedRun, engine: "DeepSpeedEngine", first: StepBatches) -> str | None:
    """Compile the encoder if the recipe says so, by a rehearsal that changes nothing. A collective.

    Args:
        run: gives the recipe.
        engine: of the model; where one rank cannot compile it, it runs eager on all.
        first: batches of the shape that all have.

    Returns:
        None if it is compiled, else why not.

    Raises:
        RuntimeError: the micro-batch does not fit into the memory.
    """
    if not run.recipe.compile:
        return "--no-compile, or a run that began so" if distributed.has_gpu() else "--compile is not given"
    if zero_stage(engine.config) == 3:
        return "ZeRO 3 gathers weights in the midst of the forward pass"
    from ksub_ds.model.compilation import compile_encoder, rehearse, run_eager

    def reason() -> str | None:
        distributed.mark_progress("the compilation of the encoder")
        get_logger().info("compiling the encoder: a minute or more; --no-compile leaves it out")
        try:
            compile_encoder(engine.module)
            rehearse(engine.module, first.on_device()[0])
        except Exception as error:  # of dynamo, of the backend, of a C++ compiler: whatever it is, eager goes without
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {_reason(str(error))}"
        return None

    reasons = distributed.gather_objects(reason())
    failed = next((rank for rank, each in enumerate(reasons) if each is not None), None)
    if failed is None:
        return None
    run_eager(engine.module)
    return reasons[failed] + (f" (on rank {failed})" if failed else "")


def _reason(message: str) -> str:
    """Return a compiler's message in one line: its beginning, and its end, where a C++ compiler says what is wrong."""
    if "InvalidCxxCompiler" in message:
        return "no C++ compiler: install g++, or name one by CXX"
    text = " ".join(message.split()).split(" Set TORCHDYNAMO_VERBOSE")[0]
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-160:]}"


def micro_batch_advice(run: ResolvedRun) -> str:
    """Return what to do when the training of a run is out of memory."""
    smaller = smaller_micro_batch(run.recipe, run.batch.world)
    advice = f"--micro-batch-size {smaller}" if smaller else "--deepspeed zero3_offload, or shards of shorter rows"
    return f"--micro-batch-size {run.batch.micro} of {run.dataset.sequence_length} tokens is too much; try {advice}"


def count_work(run: ResolvedRun, engine: "DeepSpeedEngine") -> Work:
    """Return what a token costs, and what the ranks' devices can do together. A collective."""
    from ksub_ds.model.flops import training_flops

    flops = training_flops(engine.module, run.dataset.sequence_length, run.recipe.masked_share or 1.0)
    peaks = distributed.gather_objects(peak_bf16(device_name()))
    return Work(flops, None if None in peaks else sum(peaks))


# ---------------------------------------------------------------- logged before the first step


def describe_start(run: ResolvedRun, engine: "DeepSpeedEngine", first: StepBatches, not_compiled: str | None) -> None:
    """Log versions, hosts, device, batch arithmetic, the parameter table and one training row. A collective.

    Args:
        run: what is trained.
        engine: of the model.
        first: batches of the first step.
        not_compiled: why the encoder is not compiled; None if it is.
    """
    hosts = distributed.gather_objects(socket.gethostname())
    if not distributed.is_main():
        return
    recipe, world_size = run.recipe, run.batch.world
    names = ("torch", "deepspeed", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    places = ", ".join(f"{host} x {hosts.count(host)}" for host in dict.fromkeys(hosts))
    lines = [
        f"python {platform.python_version()}, {versions}",
        f"{world_size} rank{'s' * (world_size > 1)} ({places}) on {distributed.device().type}, {recipe.precision}, "
        f"ZeRO stage {zero_stage(engine.config)}",
        f"device: {device_name()}; loss {engine.module.get_input_embeddings().structure.form}; "
        f"attention by {engine.module.config._attn_implementation}; "
        + ("encoder compiled" if not_compiled is None else f"encoder not compiled ({not_compiled})"),
        f"batch: {run.batch} sequences of {run.dataset.sequence_length} tokens a step",
        f"steps: {recipe.plan().describe()}",
        *describe_pairs(run),
        *parameter_table(engine.module, run.table),
        *decoded_row(first, run.tokenizer),
    ]
    for line in lines:
        get_logger().info(line)


def describe_pairs(run: ResolvedRun) -> list[str]:
    """Return how rows of pairs take part, as lines of text; none where they do not."""
    if not run.pairs.share:
        return []
    starts = "start again" if run.pairs.gives_positions else "go on"
    names = " ".join(run.dataset.pairs)
    return [f"pairs: {run.pairs.share:.4g} of the rows, of {names}; positions of a translation {starts}"]


def parameter_table(model: Any, table: CodeTable) -> list[str]:
    """Compare the parameters of a model with those of the same model with a plain embedding, as lines of text."""
    width = model.get_input_embeddings().embedding_dim
    total = sum(math.prod(full_shape(parameter)) for parameter in model.parameters())
    ours, plain = table.num_parameters(width), table.num_tokens * width
    name = f"sub-embedding, K = {table.num_tables}"
    if table.num_dedicated:
        name = f"K = {table.num_tables}, {table.num_dedicated:,} dedicated"
    rows = [("plain embedding", plain, total - ours + plain)]
    if table.num_tables > 1:
        rows.append((name, ours, total))
    lines = [f"{'parameters':<24}{'embedding':>14}{'total':>14}"]
    return lines + [f"{label:<24}{embedding:>14,}{whole:>14,}" for label, embedding, whole in rows]


def decoded_row(first: StepBatches, tokenizer: Tokenizer, length: int = 48) -> list[str]:
    """Return the beginning of the first training row as lines of text, as it is and as a mask shows it.

    Args:
        first: batches of the first step.
        tokenizer: of the shards.
        length: tokens that are shown.
    """
    masked = first.micro_batches[0]["input_ids"][0, :length]
    labels = first.micro_batches[0]["labels"][0, :length]
    original = [int(label) if label >= 0 else int(token) for token, label in zip(masked, labels, strict=True)]
    lines = [f"first row: {tokenizer.decode(original)}"]
    if original != masked.tolist():
        lines.append(f"   masked: {tokenizer.decode(masked.tolist())}")
    return lines

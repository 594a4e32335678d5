"""From a recipe and its sources to what the loop works on: model, teacher, engine; and what is said before step 1."""

import math
import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import log_frequency
from ksub_ds.corpus.tokenizers.loading import Tokenizer
from ksub_ds.pretrain.engine import (
    build_optimizer,
    compose_config,
    read_mechanics,
    size_buckets,
    start_engine,
    zero_stage,
)
from ksub_ds.pretrain.engine_state import full_shape
from ksub_ds.pretrain.prefetch import StepBatches
from ksub_ds.pretrain.recipe import Recipe, accumulation_steps, find_deepspeed_config
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.sources import Sources, fresh_config
from ksub_ds.pretrain.warm_start import open_warm_start


def build_for(recipe: Recipe, table: CodeTable, tokenizer: Tokenizer, warm_start: Path | None = None) -> Any:
    """The model of the preset over the codes, with weights that follow from the recipe's seed alone.

    Args:
        warm_start: the folder of the model to begin with instead.
    """
    import torch

    if recipe.warm_start is not None:
        return open_warm_start(warm_start or recipe.warm_start)

    from ksub_ds.model.presets import fresh_masked_lm

    torch.manual_seed(recipe.seed)
    return fresh_masked_lm(fresh_config(recipe, table, tokenizer), table)


def build_model(recipe: Recipe, sources: Sources) -> Any:
    """The model to train."""
    model = build_for(recipe, sources.table, sources.tokenizer)
    if recipe.dropout is not None:
        set_dropout(model, recipe.dropout)
    set_attention(model, recipe.attention)
    if recipe.decoder_bias == "frequency":
        start_bias(model, sources.dataset, recipe.alpha)
    return model


def set_dropout(model: Any, share: float) -> None:
    """Drop this share wherever the model drops; the configuration, which is exported, keeps its own."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        elif hasattr(module, "attention_dropout"):  # ModernBERT's: a number, and no layer behind it where that is 0
            module.attention_dropout = share
            module.out_drop = torch.nn.Dropout(share)


def set_attention(model: Any, name: str | None) -> None:
    """Compute attention by transformers' implementation of this name; None leaves its choice.

    Raises:
        UserError: it needs a package that is not there, or this model has no such attention.
    """
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"--attention {name}: {str(error).splitlines()[0]}") from error


def start_bias(model: Any, dataset: ShardDataset, alpha: float) -> None:
    """Set the decoder's bias to the tokens' log frequency: with small weights the model begins as a unigram model."""
    import torch

    with torch.no_grad():
        model.decoder_bias.copy_(torch.from_numpy(log_frequency(dataset, alpha)))


def build_teacher(recipe: Recipe, sources: Sources) -> Any:
    """The model to distil from, frozen; None without --distill-from."""
    if recipe.distill_from is None:
        return None
    from ksub_ds.model.distillation import Teacher

    return Teacher(recipe.distill_from, sources.table, distributed.device())


def build_engine(recipe: Recipe, model: Any, folder: RunFolder) -> Any:
    """The DeepSpeed engine of a recipe."""
    world_size = distributed.world_size()
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = compose_config(
        size_buckets(read_mechanics(find_deepspeed_config(recipe.deepspeed)), parameters),
        micro_batch_size=recipe.micro_batch_size,
        accumulation=accumulation_steps(recipe, world_size),
        world_size=world_size,
        precision=recipe.precision,
        gradient_clipping=recipe.gradient_clipping,
        tensorboard=folder.tensorboard,
    )
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    optimizer = build_optimizer(model, recipe.peak_lr, betas, recipe.adam_epsilon, recipe.weight_decay)
    return start_engine(model, optimizer, config)


def check_mechanics(recipe: Recipe) -> None:
    """Read the ds_configs file before anything heavy starts.

    Raises:
        UserError: as `read_mechanics` and `compose_config`.
    """
    mechanics = read_mechanics(find_deepspeed_config(recipe.deepspeed))
    compose_config(
        mechanics, micro_batch_size=1, accumulation=1, world_size=1, precision=recipe.precision, gradient_clipping=0.0
    )


# ---------------------------------------------------------------- said before the first step


def describe_start(recipe: Recipe, sources: Sources, engine: Any, first: StepBatches) -> None:
    """Log versions, places, batch arithmetic, the parameter table and one training row. A collective."""
    hosts = distributed.gather_objects(socket.gethostname())
    if not distributed.is_main():
        return
    world_size = distributed.world_size()
    accumulation = accumulation_steps(recipe, world_size)
    assert recipe.micro_batch_size * accumulation * world_size == recipe.global_batch_size
    names = ("torch", "deepspeed", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    places = ", ".join(f"{host} x {hosts.count(host)}" for host in dict.fromkeys(hosts))
    lines = [
        f"python {platform.python_version()}, {versions}",
        f"{world_size} rank{'s' * (world_size > 1)} ({places}) on {distributed.device().type}, {recipe.precision}, "
        f"ZeRO stage {zero_stage(engine.config)}",
        f"batch: micro {recipe.micro_batch_size} x accumulation {accumulation} x ranks {world_size} = "
        f"{recipe.global_batch_size} sequences of {sources.dataset.sequence_length} tokens a step",
        f"steps: {recipe.max_steps:,}, learning rate to {recipe.peak_lr:g} over {recipe.warmup_steps:,} steps, "
        "then linearly down",
        *parameter_table(engine.module, sources.table),
        *decoded_row(first, sources.tokenizer),
    ]
    for line in lines:
        get_logger().info(line)


def parameter_table(model: Any, table: CodeTable) -> list[str]:
    """Parameters of this model beside the same model with a plain embedding, as lines of text."""
    width = model.get_input_embeddings().embedding_dim
    total = sum(math.prod(full_shape(parameter)) for parameter in model.parameters())
    ours, plain = table.num_parameters(width), table.num_tokens * width
    name = "plain" if table.num_tables == 1 else f"sub-embedding, K = {table.num_tables}"
    rows = [("plain embedding", plain, total - ours + plain)]
    if table.num_tables > 1:
        rows.append((name, ours, total))
    lines = [f"{'parameters':<24}{'embedding':>14}{'total':>14}"]
    return lines + [f"{label:<24}{embedding:>14,}{whole:>14,}" for label, embedding, whole in rows]


def decoded_row(first: StepBatches, tokenizer: Tokenizer, length: int = 48) -> list[str]:
    """The beginning of the first training row, as it is and as the model sees it."""
    masked = first.micro_batches[0]["input_ids"][0, :length]
    labels = first.micro_batches[0]["labels"][0, :length]
    original = [int(label) if label >= 0 else int(token) for token, label in zip(masked, labels, strict=True)]
    return [
        f"first row: {tokenizer.decode(original)}",
        f"   masked: {tokenizer.decode([int(token) for token in masked])}",
    ]


def held_out_languages(dataset: ShardDataset) -> list[str]:
    """Languages with a held-out part."""
    return [language for language in dataset.languages if dataset.num_sequences("validation", language) > 0]

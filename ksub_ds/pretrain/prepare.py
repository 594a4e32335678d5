"""From a recipe to everything the loop works on: sources, model, engine, and what is said before step 1."""

import math
import platform
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.frequency import log_frequency
from ksub_ds.corpus.shards import ShardDataset
from ksub_ds.corpus.tokenizer import Tokenizer, load_tokenizer
from ksub_ds.pretrain.engine import (
    build_optimizer,
    compose_config,
    read_mechanics,
    size_buckets,
    start_engine,
    zero_stage,
)
from ksub_ds.pretrain.engine_state import full_shape
from ksub_ds.pretrain.feed import StepBatches
from ksub_ds.pretrain.recipe import Recipe, accumulation_steps, find_deepspeed_config
from ksub_ds.pretrain.recipe_file import to_json
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.warm_start import check_same_tokens, fingerprint, open_warm_start, read_codes


@dataclass(frozen=True)
class Sources:
    """What a run learns from, and the codes it learns with."""

    table: CodeTable
    dataset: ShardDataset
    tokenizer: Tokenizer
    warm_start_sha256: str | None = None

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """The content of RUN/recipe.json: the recipe, and what codes and data must be at a resume."""
        return to_json(recipe) | {
            "num_tokens": self.table.num_tokens,
            "table_sizes": list(self.table.table_sizes),
            "sequence_length": self.dataset.sequence_length,
            "codes_sha256": self.table.sha256,
            "data_fingerprint": self.dataset.fingerprint,
            "warm_start_sha256": self.warm_start_sha256,
        }


def load_sources(recipe: Recipe) -> Sources:
    """Open shards, tokenizer and codes, and check that they belong together. Rank 0 also checks every shard's sha256.

    Raises:
        UserError: naming the file at fault.
    """
    dataset = ShardDataset.open(recipe.data, verify=distributed.is_main())
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    dataset.check_tokenizer(tokenizer.fingerprint, str(dataset.tokenizer_folder))
    if recipe.distill_from is not None and Path(recipe.distill_from).is_dir():
        check_same_tokens("--distill-from", Path(recipe.distill_from), tokenizer, dataset)
    if recipe.warm_start is not None:
        return _load_warm_start(recipe, dataset, tokenizer)
    if recipe.codes is None:
        return Sources(plain_codes(tokenizer.vocab_size), dataset, tokenizer)
    table = CodeTable.load(recipe.codes)
    if table.num_tokens != tokenizer.vocab_size:
        raise UserError(
            f"--codes {recipe.codes}: codes of {table.num_tokens:,} tokens, but the tokenizer of {recipe.data} has "
            f"{tokenizer.vocab_size:,}; make codes with --num-tokens {tokenizer.vocab_size}"
        )
    theirs = table.metadata.get("tokenizer_fingerprint")
    if theirs and theirs != tokenizer.fingerprint:
        raise UserError(
            f"--codes {recipe.codes}: made for another tokenizer (fingerprint {theirs[:12]}..., the shards' has "
            f"{tokenizer.fingerprint[:12]}...); make them with --tokenizer {dataset.tokenizer_folder}"
        )
    _check_width(recipe, table)
    return Sources(table, dataset, tokenizer)


def _load_warm_start(recipe: Recipe, dataset: ShardDataset, tokenizer: Tokenizer) -> Sources:
    folder = recipe.warm_start
    table = read_codes(folder)
    check_same_tokens("--warm-start", folder, tokenizer, dataset)
    if table.num_tokens != tokenizer.vocab_size:
        raise UserError(
            f"--warm-start {folder}: a model of {table.num_tokens:,} tokens, but the tokenizer of {recipe.data} has "
            f"{tokenizer.vocab_size:,}; make shards with the model's tokenizer"
        )
    if recipe.codes is not None and CodeTable.load(recipe.codes).sha256 != table.sha256:
        raise UserError(f"--codes {recipe.codes}: are not the codes of --warm-start {folder}; leave --codes out")
    return Sources(table, dataset, tokenizer, fingerprint(folder))


def _check_width(recipe: Recipe, table: CodeTable) -> None:
    """Every table gives at least one of the d columns of an embedding."""
    from ksub_ds.model.configuration import KSubRobertaConfig

    width = getattr(KSubRobertaConfig, recipe.preset)().hidden_size
    if table.num_tables > width:
        raise UserError(
            f"--codes {recipe.codes}: K = {table.num_tables} tables, but the embedding of {recipe.preset} has only "
            f"d = {width} columns to share out; make codes with --num-tokens {table.num_tokens} and a smaller "
            "--num-tables"
        )


def build_for(recipe: Recipe, table: CodeTable, tokenizer: Tokenizer, warm_start: Path | None = None) -> Any:
    """The model of the preset over the codes, with weights that follow from the recipe's seed alone.

    Args:
        warm_start: the folder of the model to begin with instead.
    """
    import torch

    if recipe.warm_start is not None:
        return open_warm_start(warm_start or recipe.warm_start)

    from ksub_ds.model.configuration import KSubRobertaConfig
    from ksub_ds.model.modeling import KSubRobertaForMaskedLM

    config = getattr(KSubRobertaConfig, recipe.preset)(
        vocab_size=table.num_tokens,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    torch.manual_seed(recipe.seed)
    return KSubRobertaForMaskedLM(config, table)


def build_model(recipe: Recipe, sources: Sources) -> Any:
    """The model to train.

    Raises:
        UserError: rows longer than the model's positions.
    """
    model = build_for(recipe, sources.table, sources.tokenizer)
    longest = model.config.max_position_embeddings
    if model.config.model_type == "ksub_roberta":
        longest -= model.config.pad_token_id + 1  # RoBERTa's positions begin after the padding's
    if sources.dataset.sequence_length > longest:
        raise UserError(
            f"--data {recipe.data}: rows of {sources.dataset.sequence_length} tokens, but the model has "
            f"positions for {longest}; make shards with --sequence-length {longest}"
        )
    if recipe.decoder_bias == "frequency":
        start_bias(model, sources.dataset, recipe.alpha)
    return model


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

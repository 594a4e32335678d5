"""A recipe with all that follows from it: batch sizes, DeepSpeed's mechanics, shards, tokenizer, codes, network.

Everything is read and checked once, before the run folder is claimed and before a model is built.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.batches import PairSettings, masking_rule
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.model.sequence_length import first_position, longest_sequence
from ksub_ds.pretrain.engine import check_monitors, check_precision, find_deepspeed_config, read_mechanics
from ksub_ds.pretrain.recipe import BatchSizes, Recipe, divide_batch, resolve, to_json
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.warm_start import (
    check_head,
    check_same_tokens,
    codes_for,
    fingerprint,
    fingerprint_of,
    read_codes,
)


@dataclass(frozen=True)
class ResolvedSettings:
    """What a recipe says on these ranks, before any data is opened.

    Attributes:
        recipe: with no setting left open.
        batch: how the global batch is divided over the ranks.
        mechanics: the ds_configs file, as read.
    """

    recipe: Recipe
    batch: BatchSizes
    mechanics: dict[str, Any]


@dataclass(frozen=True)
class ResolvedRun(ResolvedSettings):
    """All that a run is built from: the settings and what they name. The parts of a run take it from here.

    Attributes:
        dataset: the token shards.
        tokenizer: the one that made them.
        table: the codes.
        config: configuration of the network, a transformers one of our families.
        warm_start_sha256: fingerprint of the model of --warm-start; None without one.
        distill_from_sha256: of the model of --distill-from; None without one, and of a name on the hub.
    """

    dataset: ShardDataset
    tokenizer: Tokenizer
    table: CodeTable
    config: Any
    warm_start_sha256: str | None = None
    distill_from_sha256: str | None = None

    @property
    def pairs(self) -> PairSettings:
        """How rows of pairs take part."""
        return PairSettings(self.recipe.tlm_share, self.recipe.reset_positions, first_position(self.config))

    def identity(self) -> dict[str, Any]:
        """Return the content of RUN/recipe.json: the recipe, and what codes and data must be at a resume."""
        teacher = {} if self.distill_from_sha256 is None else {"distill_from_sha256": self.distill_from_sha256}
        return to_json(self.recipe) | {
            "num_tokens": self.table.num_tokens,
            "table_sizes": list(self.table.table_sizes),
            "sequence_length": self.dataset.sequence_length,
            "codes_sha256": self.table.sha256,
            "data_fingerprint": self.dataset.fingerprint,
            "warm_start_sha256": self.warm_start_sha256,
            **teacher,
        }


def resolve_settings(recipe: Recipe, previous_micro_batch_size: int | None = None) -> ResolvedSettings:
    """Resolve a recipe for the ranks of this run, and read its ds_configs file.

    Args:
        recipe: as given on the command line.
        previous_micro_batch_size: of the run that is continued.

    Raises:
        UserError: settings that contradict each other, or a ds_configs file that cannot be used.
    """
    world_size = distributed.world_size()
    recipe = resolve(recipe, world_size, distributed.has_gpu(), previous_micro_batch_size)
    mechanics = read_mechanics(path := find_deepspeed_config(recipe.deepspeed))
    if distributed.is_main():
        check_monitors(mechanics, path)
    check_precision(mechanics, recipe.precision)
    return ResolvedSettings(recipe, divide_batch(recipe, world_size), mechanics)


def open_sources(settings: ResolvedSettings) -> ResolvedRun:
    """Open shards, tokenizer and codes, and check that they and the network belong together.

    Raises:
        UserError: naming the file at fault.
    """
    recipe = settings.recipe
    dataset = ShardDataset.open(recipe.data, verify=False)
    masking_rule(dataset, None if recipe.is_causal else recipe.mlm_probability)  # refuses masks where there are none
    if recipe.tlm_share < 1 and not any(dataset.num_sequences("train", language) for language in dataset.languages):
        only = "; train on its pairs with --tlm-share 1" if dataset.pairs and not recipe.is_causal else ""
        raise UserError(f"--data {recipe.data}: holds no sequences to train on; make shards of more text{only}")
    if recipe.tlm_share > 0 and not any(dataset.num_sequences("train", pair) for pair in dataset.pairs):
        raise UserError(
            f"--tlm-share {recipe.tlm_share}: {recipe.data} holds no pairs to train on; add some with "
            "preprocessing/shard_text.py --parallel"
        )
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    dataset.check_tokenizer(tokenizer.fingerprint, str(dataset.tokenizer_folder))
    distill_from_sha256 = None
    if recipe.distill_from is not None:
        distill_from_sha256 = _check_teacher(recipe.distill_from, tokenizer, dataset)
    warm_start_sha256 = None
    if recipe.warm_start is not None:
        table = _warm_start_codes(recipe, dataset, tokenizer)
        warm_start_sha256 = fingerprint(recipe.warm_start)
    elif recipe.codes is not None:
        table = _load_codes(recipe, dataset, tokenizer)
    else:
        table = plain_codes(tokenizer.vocab_size)
    config = network_config(recipe, table, tokenizer)
    if recipe.codes is not None:
        _check_width(recipe, table, config)
    _check_length(recipe, dataset, config)
    sources = (dataset, tokenizer, table, config, warm_start_sha256, distill_from_sha256)
    return ResolvedRun(recipe, settings.batch, settings.mechanics, *sources)


def network_config(
    recipe: Recipe, table: CodeTable, tokenizer: Tokenizer | None, warm_start: Path | None = None
) -> Any:
    """Return the configuration of a recipe's network: of the preset over the codes, or of the warm start's model.

    Args:
        recipe: a resolved recipe.
        table: the codes.
        tokenizer: of the data; names the special tokens. None where only shapes matter.
        warm_start: folder of the warm start's model; default where the recipe says.
    """
    if recipe.warm_start is not None:
        from ksub_ds.model.loading import open_config

        return open_config(warm_start or recipe.warm_start)
    from ksub_ds.model.presets import preset_config

    fields: dict[str, Any] = {"vocab_size": table.num_tokens}
    if recipe.is_causal:
        fields["decoder_bias"] = recipe.decoder_bias == "frequency"
    if tokenizer is not None:
        fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    return preset_config(recipe.preset, **fields)


def verify_shards(dataset: ShardDataset) -> None:
    """Read every shard once and compare its sha256, each rank its share. A collective.

    The ranks meet after each file: a rank that reads in silence for an hour would be taken for hung.

    Raises:
        UserError: on every rank, naming a damaged shard.
    """
    paths = dataset.paths()
    for start in range(0, len(paths), distributed.world_size()):
        mine = paths[start + distributed.rank() :][:1]
        distributed.raise_on_all_ranks(partial(_verify_all, dataset, mine))


def _verify_all(dataset: ShardDataset, paths: list[Path]) -> None:
    for path in paths:
        dataset.verify(path)


def _load_codes(recipe: Recipe, dataset: ShardDataset, tokenizer: Tokenizer) -> CodeTable:
    table = CodeTable.load(recipe.codes)
    if not table.unique:
        raise UserError(
            f"--codes {recipe.codes}: tokens share codes, which only the input of a sentence encoder or classifier can "
            "use; make codes with `ksub codes`"
        )
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
    return table


def _check_teacher(name: str, tokenizer: Tokenizer, dataset: ShardDataset) -> str | None:
    """Check that there is a teacher of the same tokens, and return the fingerprint of its folder; None on the hub.

    Raises:
        UserError: no model, or another tokenizer.
    """
    from ksub_ds.model.loading import open_config

    try:
        open_config(name)
    except UserError as error:
        run = RunFolder(Path(name)).recipe.is_file()
        hint = f"; `ksub export {name} --out MODEL` makes a model of this run" if run else ""
        raise UserError(f"--distill-from {error}{hint}") from error
    folder = Path(name)
    if not folder.is_dir():
        return None
    check_same_tokens("--distill-from", folder, tokenizer, dataset)
    return fingerprint_of([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _warm_start_codes(recipe: Recipe, dataset: ShardDataset, tokenizer: Tokenizer) -> CodeTable:
    folder = recipe.warm_start
    check_head(folder, recipe)
    table = read_codes(folder)
    check_same_tokens("--warm-start", folder, tokenizer, dataset)
    if table.num_tokens != tokenizer.vocab_size:
        raise UserError(
            f"--warm-start {folder}: a model of {table.num_tokens:,} tokens, but the tokenizer of {recipe.data} has "
            f"{tokenizer.vocab_size:,}; make shards with the model's tokenizer"
        )
    if recipe.codes is not None:
        return codes_for(folder, CodeTable.load(recipe.codes), str(recipe.codes))
    return table


def _check_width(recipe: Recipe, table: CodeTable, config: Any) -> None:
    """Check that every table gives at least one of the d columns of an embedding.

    Raises:
        UserError: more tables than columns.
    """
    width = config.hidden_size
    if table.num_tables > width:
        raise UserError(
            f"--codes {recipe.codes}: K = {table.num_tables} tables, but the embedding of {recipe.preset} has only "
            f"d = {width} columns to share out; make codes with --num-tokens {table.num_tokens} and a smaller "
            "--num-tables"
        )


def _check_length(recipe: Recipe, dataset: ShardDataset, config: Any) -> None:
    """Check that rows are no longer than the network's positions.

    Raises:
        UserError: they are.
    """
    longest = longest_sequence(config)
    if longest is not None and dataset.sequence_length > longest:
        raise UserError(
            f"--data {recipe.data}: rows of {dataset.sequence_length} tokens, but the model has "
            f"positions for {longest}; make shards with --sequence-length {longest}"
        )

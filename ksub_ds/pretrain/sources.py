"""What a run learns from: shards, their tokenizer and the codes, checked against each other and against the model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.pretrain.recipe import Recipe, to_json
from ksub_ds.pretrain.warm_start import check_same_tokens, fingerprint, read_codes


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
    """Open shards, tokenizer and codes, and check that they and the model belong together, before a run is claimed.

    Raises:
        UserError: naming the file at fault.
    """
    dataset = ShardDataset.open(recipe.data, verify=False)
    if not any(dataset.num_sequences("train", language) for language in dataset.languages):
        raise UserError(f"--data {recipe.data}: holds no sequences to train on; make shards of more text")
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    dataset.check_tokenizer(tokenizer.fingerprint, str(dataset.tokenizer_folder))
    if recipe.distill_from is not None and Path(recipe.distill_from).is_dir():
        check_same_tokens("--distill-from", Path(recipe.distill_from), tokenizer, dataset)
    if recipe.warm_start is not None:
        sources = _load_warm_start(recipe, dataset, tokenizer)
    elif recipe.codes is None:
        sources = Sources(plain_codes(tokenizer.vocab_size), dataset, tokenizer)
    else:
        sources = Sources(_load_codes(recipe, dataset, tokenizer), dataset, tokenizer)
    _check_length(recipe, sources)
    return sources


def verify_shards(dataset: ShardDataset) -> None:
    """Read every shard once and compare its sha256, each rank its share. A collective.

    The ranks meet after each file: who waits for one that reads for an hour in silence takes it for hung.

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
    return table


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
    from ksub_ds.model.presets import preset_config

    width = preset_config(recipe.preset).hidden_size
    if table.num_tables > width:
        raise UserError(
            f"--codes {recipe.codes}: K = {table.num_tables} tables, but the embedding of {recipe.preset} has only "
            f"d = {width} columns to share out; make codes with --num-tokens {table.num_tokens} and a smaller "
            "--num-tables"
        )


def _check_length(recipe: Recipe, sources: Sources) -> None:
    """Rows are no longer than the model's positions."""
    if recipe.warm_start is not None:
        from ksub_ds.model.loading import open_config

        config = open_config(recipe.warm_start)
    else:
        config = fresh_config(recipe, sources.table, sources.tokenizer)
    longest = config.max_position_embeddings
    if config.model_type == "ksub_roberta":
        longest -= config.pad_token_id + 1  # RoBERTa's positions begin after the padding's
    if sources.dataset.sequence_length > longest:
        raise UserError(
            f"--data {recipe.data}: rows of {sources.dataset.sequence_length} tokens, but the model has "
            f"positions for {longest}; make shards with --sequence-length {longest}"
        )


def fresh_config(recipe: Recipe, table: CodeTable, tokenizer: Tokenizer) -> Any:
    """The configuration of the preset over the codes."""
    from ksub_ds.model.presets import preset_config

    return preset_config(
        recipe.preset,
        vocab_size=table.num_tokens,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )

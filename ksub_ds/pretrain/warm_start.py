"""Starting from the weights of a model instead of fresh ones: `ksub pretrain --warm-start DIR`.

DIR is a folder of one of our masked or causal language models, from `ksub compress` or `ksub export`. It gives the
network, the codes and the weights; the optimizer, the schedule and the data start afresh. The run keeps a copy, so that
the run folder alone can be continued and exported. With `--codes`, the same codes with more dedicated tokens, these get
rows of their own, which begin at zero: the model computes what it did.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json, sha256_file
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.pretrain.recipe import CAUSAL_PRESETS, PRESETS, Recipe
from ksub_ds.pretrain.run_folder import RunFolder

HEADS = ("ForMaskedLM", "ForCausalLM")


def model_files(folder: Path) -> list[Path]:
    """Return the paths of config.json and the weights of a model folder.

    Raises:
        UserError: not a language model over sub-embeddings.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--warm-start {folder}: holds no config.json; give a folder of `ksub compress` or `ksub export`"
            + (
                f" (`ksub export {folder} --out MODEL` makes one of this run)"
                if RunFolder(folder).recipe.is_file()
                else ""
            )
        )
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or [""])[0]
    if not str(config.get("model_type", "")).startswith("ksub_") or not architecture.endswith(HEADS):
        raise UserError(
            f"--warm-start {folder}: is a {architecture or 'model of unknown kind'}; give a masked or causal language "
            "model over sub-embeddings, which `ksub compress` makes of a plain one"
        )
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    weights = [path for path in weights if path.name.startswith("model")]
    if not weights:
        raise UserError(f"--warm-start {folder}: holds no model.safetensors")
    return [folder / "config.json", *weights]


def check_head(folder: Path, recipe: Recipe) -> None:
    """Check that a model learns the objective of a recipe.

    Raises:
        UserError: a masked model for a causal objective, or the other way round.
    """
    config, *_ = model_files(folder)
    architecture = read_json(config)["architectures"][0]
    if architecture.endswith("ForCausalLM") != recipe.is_causal:
        fitting = [name for name in PRESETS if (name in CAUSAL_PRESETS) != recipe.is_causal]
        raise UserError(
            f"--warm-start {folder}: is a {architecture}, but --preset {recipe.preset} learns {recipe.objective}; "
            f"take the schedule of --preset {' or '.join(fitting)}"
        )


def fingerprint(folder: Path) -> str:
    """Return one sha256 of the content of all model files."""
    return fingerprint_of(model_files(folder))


def fingerprint_of(paths: Sequence[Path]) -> str:
    """Return one sha256 of the names and the content of files."""
    files = [f"{path.name} {sha256_file(path)}" for path in paths]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def read_codes(folder: Path) -> CodeTable:
    """Read the codes among the weights.

    Raises:
        UserError: they are absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    config, *weights = model_files(folder)
    sizes, dedicated, codes = read_json(config).get("table_sizes"), None, None
    try:
        for path in (path for path in weights if path.suffix == ".safetensors"):
            with safe_open(path, framework="np") as stream:
                for name in stream.keys():  # noqa: SIM118 - not a dict
                    if name.endswith(".codes"):
                        codes = stream.get_tensor(name)
                    elif name.endswith(".dedicated"):
                        dedicated = stream.get_tensor(name)
        if codes is not None:
            table = CodeTable(codes, sizes, {"algorithm": f"of {folder.resolve().name}"}, dedicated)
            table.verify()
            return table
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"--warm-start {folder}: no usable codes among the weights ({error})") from error
    raise UserError(f"--warm-start {folder}: no codes among the weights; write the folder anew")


def codes_for(folder: Path, given: CodeTable, name: str) -> CodeTable:
    """Check that the codes of --codes are those of the model, with its dedicated tokens and maybe more; return them.

    Args:
        folder: of the model.
        given: the codes.
        name: their file.

    Raises:
        UserError: other codes, or dedicated tokens of the model that are not among theirs.
    """
    own = read_codes(folder)
    fit = f"fit the model to them first: ksub compress {folder} --codes {name} --out MODEL"
    if own.table_sizes != given.table_sizes or not np.array_equal(own.codes, given.codes):
        raise UserError(f"--codes {name}: are not the codes of --warm-start {folder}; leave --codes out, or {fit}")
    lost = np.setdiff1d(own.dedicated, given.dedicated)
    if len(lost):
        raise UserError(
            f"--codes {name}: lack {len(lost):,} of the {own.num_dedicated:,} dedicated tokens of --warm-start "
            f"{folder} (token {lost[0]}), whose rows would be lost; leave --codes out, or {fit}"
        )
    return given


def keep_copy(source: Path, target: Path, sha256: str) -> None:
    """Copy the model files into the run, unless they are there.

    Args:
        source: the model's folder.
        target: folder in the run.
        sha256: the fingerprint of the source.
    """
    try:
        is_there = target.exists() and fingerprint(target) == sha256
    except UserError:  # damaged
        is_there = False
    if not is_there:
        with atomic_folder(target) as temporary:
            for path in model_files(source):
                shutil.copyfile(path, temporary / path.name)


def open_warm_start(folder: Path, table: CodeTable) -> Any:
    """Open the model, with its weights, in fp32, and add the dedicated rows that it lacks, which are zero.

    Args:
        folder: of the model.
        table: the model's codes, with its dedicated tokens and maybe more.

    Raises:
        UserError: it cannot be read.
    """
    from ksub_ds.model.loading import open_model

    model_files(folder)
    model = open_model(folder)
    if table.num_dedicated:
        model.add_dedicated_rows(table.dedicated)
    return model.float().train()


def check_same_tokens(flag: str, model: Path, tokenizer: Tokenizer, dataset: ShardDataset) -> None:
    """Check that a model whose folder holds a tokenizer has that of the data.

    Args:
        flag: the option that names the model, for the error.
        model: its folder.
        tokenizer: of the data.
        dataset: the shards.

    Raises:
        UserError: another tokenizer.
    """
    try:
        theirs = load_tokenizer(model)
    except UserError:
        return  # none there, or of an unknown kind: the number of tokens is checked elsewhere
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{flag} {model}: has another tokenizer than the data (fingerprint {theirs.fingerprint[:12]}..., the "
            f"shards' {tokenizer.fingerprint[:12]}...); make shards with --tokenizer {model}"
        )

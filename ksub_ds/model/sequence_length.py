"""How many tokens a model reads in a row, and a tokenizer beside it that cuts longer text to that many."""

from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json

# These number their positions from pad_token_id + 1, so the first ones are never used.
POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer", "ibert", "data2vec-text")


def longest_sequence(config: Any) -> int | None:
    """Return the most tokens of a row, special ones included; None if the model sets no bound.

    Args:
        config: of a transformers model, or of one of ours: 514 positions after padding 1 are 512 tokens.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    return int(positions) - first_position(config)


def first_position(config: Any) -> int:
    """Return the number that a model gives to the position of a row's first token.

    Args:
        config: of a transformers model, or of one of ours.
    """
    if any(kind in config.model_type for kind in POSITIONS_AFTER_PADDING):
        return int(config.pad_token_id or 0) + 1
    return 0


def limit_tokenizer(folder: Path, config: Any) -> None:
    """Write a model's length into the tokenizer beside it, so that `truncation=True` cuts to it.

    Without it transformers takes any length, and a long text ends in an index error inside the network.

    Args:
        folder: of the model; nothing happens where it holds no tokenizer_config.json.
        config: the model's.

    Raises:
        UserError: a tokenizer_config.json that is damaged.
    """
    path, longest = folder / "tokenizer_config.json", longest_sequence(config)
    if longest is None or not path.is_file():
        return
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a tokenizer's configuration; get the model anew")
    stated = settings.get("model_max_length")
    if not isinstance(stated, int | float) or stated > longest:  # "no limit" is stored as 1e30
        write_json(path, settings | {"model_max_length": longest})

"""Open what is to be analysed: an exported model, a run's newest checkpoint, an encoder or a causal model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.analysis.sample import RowTokenizer
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import sha256_file
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.corpus.tokenizers.location import is_hub_name
from ksub_ds.evaluate.lm.tokens import CausalTokenizer
from ksub_ds.model.sequence_length import longest_sequence
from ksub_ds.pretrain.open_run import is_run, open_run

HARMLESS = ("pooler.", "position_ids", "token_type_ids")  # may be missing from a checkpoint: no state comes from them


@dataclass(frozen=True)
class Encoder:
    """A model to analyse.

    Attributes:
        name: for legends and files; unique among the models of one analysis.
        source: what was given on the command line.
        model: in evaluation mode; called with output_hidden_states=True it gives layers 0 (embedding) to L.
        last_codes: (N,) by which points are coloured; None for a plain model without --codes.
        table_sizes: M_1 .. M_K of the model itself; empty for a plain one.
        fingerprint: sha256 of the weights file; empty when there are several.
    """

    name: str
    source: str
    model: Any
    tokenizer: RowTokenizer
    last_codes: np.ndarray | None
    table_sizes: tuple[int, ...]
    fingerprint: str

    @property
    def num_parameters(self) -> int:
        """The parameters of the encoder, without pooler and head."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("pooler."))

    @property
    def longest_row(self) -> int | None:
        """The most tokens of a row, special ones included; None when the model sets no bound."""
        return longest_sequence(self.model.config)


class CausalRowTokenizer:
    """The tokenizer of a causal model, which rarely has padding and never a mask.

    A row begins as the documents of `ksub evaluate lm` do. What ends or pads it stands behind all ordinary tokens,
    whose states do not see it.

    Args:
        path: a folder or a SentencePiece .model.

    Raises:
        UserError: it cannot be opened, or has no token to begin a row with.
    """

    def __init__(self, path: str):
        self._tokenizer = CausalTokenizer(path)
        start, end = self._tokenizer.start_id, self._tokenizer.end_id
        if start is None or end is None:
            raise UserError(f"{path}: has neither bos_token nor eos_token to begin a row with; name one in its files")
        self.bos_id, self.eos_id, self.pad_id = start, end, end
        self.vocab_size, self.fingerprint = self._tokenizer.vocab_size, self._tokenizer.fingerprint

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Do as RowTokenizer.encode_batch."""
        return self._tokenizer.encode_batch(texts)

    def tokens(self) -> list[str]:
        """Do as RowTokenizer.tokens."""
        return self._tokenizer.tokens()


def open_encoder(source: str, name: str, tokenizer: Path | None = None, codes: CodeTable | None = None) -> Encoder:
    """Open a model to analyse its states.

    Args:
        source: a folder of `ksub export` or of any HuggingFace encoder or causal model, a run folder, or a name on
            the Hub.
        name: what to call it.
        tokenizer: SentencePiece .model or HuggingFace folder; default the one that lies with the model.
        codes: colours a plain model; one with codes of its own keeps them.

    Raises:
        UserError: nothing usable there, weights missing from it, or a tokenizer or codes of another vocabulary.
    """
    folder = Path(source)
    own_tokenizer: RowTokenizer | None = None
    if is_run(folder):
        model, own_tokenizer, fingerprint = _from_run(folder)
    else:
        model, fingerprint = _from_huggingface(source)
    load: Callable[[Path], RowTokenizer] = load_tokenizer
    if _is_causal(model.config):
        load = _load_causal
    if tokenizer is not None:
        own_tokenizer = load(tokenizer)
    elif own_tokenizer is None:
        if not folder.is_dir():
            raise UserError(f"{source}: give its tokenizer by --tokenizer (a folder or a SentencePiece .model)")
        own_tokenizer = _beside(folder, load)
    vocabulary = model.get_input_embeddings().num_embeddings
    if own_tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{source}: embeds {vocabulary:,} tokens, its tokenizer has {own_tokenizer.vocab_size:,}; "
            "give the right one by --tokenizer"
        )
    if codes is not None and codes.num_tokens < own_tokenizer.vocab_size:
        raise UserError(
            f"--codes: has {codes.num_tokens:,} tokens, the tokenizer of {source} {own_tokenizer.vocab_size:,}; give "
            "codes of this vocabulary"
        )
    last_codes, table_sizes = _codes_of(model, source, codes)
    return Encoder(name, source, model, own_tokenizer, last_codes, table_sizes, fingerprint)


def _from_run(folder: Path) -> tuple[Any, Tokenizer, str]:
    checkpoint = open_run(folder).checkpoint()
    return checkpoint.load_model().base_model, checkpoint.run.tokenizer, sha256_file(checkpoint.weights)


def _from_huggingface(source: str) -> tuple[Any, str]:
    from transformers import AutoModel

    from ksub_ds.model.loading import quiet_transformers
    from ksub_ds.model.registration import register

    register()
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source}: neither a model (config.json) nor a run (recipe.json); give one of these")
    if not folder.is_dir() and not is_hub_name(source):
        raise UserError(f"{source}: no such folder")
    try:
        with quiet_transformers():
            model, told = AutoModel.from_pretrained(
                source, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # the library raises many kinds for a damaged or absent model
        reason = one_line(error)
        what = "transformers cannot open this model" if folder.is_dir() else "no such folder, and no model to be had"
        raise UserError(f"{source}: {what} ({reason})") from error
    missing = sorted(key for key in told["missing_keys"] if not any(part in key for part in HARMLESS))
    if missing:
        raise UserError(f"{source}: {missing[0]} is not among its weights, it would be random; save the model anew")
    has_states = all(hasattr(model.config, name) for name in ("num_hidden_layers", "hidden_size"))
    readable = has_states and (hasattr(model, "embeddings") or _is_causal(model.config))
    if getattr(model.config, "is_encoder_decoder", False) or not readable:
        raise UserError(
            f"{source}: is a {model.config.model_type} model; give an encoder such as BERT or XLM-R, or a causal model"
        )
    weights = folder / "model.safetensors"
    return model.eval(), sha256_file(weights) if weights.is_file() else ""


def _is_causal(config: Any) -> bool:
    """Return whether a model predicts the next token, and nothing that is masked."""
    from ksub_ds.model.loading import has_causal_form, has_masked_form

    return has_causal_form(config) and not has_masked_form(config)


def _load_causal(path: Path) -> RowTokenizer:
    return CausalRowTokenizer(str(path))


def _beside(folder: Path, load: Callable[[Path], RowTokenizer]) -> RowTokenizer:
    try:
        return load(folder)
    except UserError as error:
        raise UserError(f"{error} (or give one by --tokenizer)") from error


def _codes_of(model: Any, source: str, given: CodeTable | None) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """Return the last codes to colour by, and the model's own table sizes.

    Raises:
        UserError: the given codes are of a larger vocabulary.
    """
    embedding = model.get_input_embeddings()
    own = embedding.code_table() if hasattr(embedding, "code_table") else None
    if own is not None and own.num_tables > 1:
        return own.codes[:, -1], own.table_sizes
    if given is None:
        return None, ()
    if given.num_tokens > embedding.num_embeddings:
        raise UserError(f"--codes: has {given.num_tokens:,} tokens, {source} embeds {embedding.num_embeddings:,}")
    padding = np.zeros(embedding.num_embeddings - given.num_tokens, dtype=np.int32)
    return np.concatenate([given.codes[:, -1], padding]), ()

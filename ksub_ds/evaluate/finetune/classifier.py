"""Open any HuggingFace encoder with a fresh classification head, and describe it.

Our models and all others are opened by the Auto classes; only safetensors are read.
"""

import hashlib
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import sha256_file
from ksub_ds.corpus.tokenizers.location import holds_tokenizer
from ksub_ds.evaluate.data.hub import cached_folder, require_on_hub
from ksub_ds.evaluate.finetune.encoding import PairEncoder, load_encoder
from ksub_ds.model.sequence_length import longest_sequence
from ksub_ds.pretrain.open_run import is_run
from ksub_ds.vectors.matrix import TensorFiles

HEADS = ("classifier", "score", "pooler", "pre_classifier", "classification_head", "sequence_summary", "head")
FRESH_HEADS = ("classifier", "score", "pre_classifier", "classification_head")  # those that no pretraining trains


def load_classifier(path: str, num_labels: int, seed: int, body: str | None = None) -> Any:
    """Open a sequence classification model in fp32: the weights of `path`, a head drawn from the seed.

    A head that is in the folder already, of an earlier fine-tuning, is drawn anew like any other.

    Args:
        path: a model folder, or a name on the hub.
        num_labels: classes; 1 for regression.
        seed: of the head.
        body: take the weights below the head from this folder instead (the MNLI checkpoint, for RTE and others).

    Raises:
        UserError: not a model transformers can open, or one whose weights are not those of its encoder.
    """
    import torch

    torch.manual_seed(seed)
    model, trained = _load(path, num_labels)
    if trained:
        _draw_head(model)
    if body is not None:
        donor, _ = _load(body, None)
        theirs, ours = donor.base_model.state_dict(), model.base_model.state_dict()
        if {key: value.shape for key, value in theirs.items()} != {key: value.shape for key, value in ours.items()}:
            raise UserError(f"{body}: is not a fine-tuned form of {path}: their weights have other names or shapes")
        model.base_model.load_state_dict(theirs)
    return model.train()


def load_trained(path: str | Path, option: str = "") -> Any:
    """Open a fine-tuned model with its head, ready to score.

    Args:
        path: its folder, or a name on the hub.
        option: the one that names it, for messages.

    Raises:
        UserError: as `load_classifier`, and for a folder without a trained head.
    """
    return _load(str(path), None, option)[0].eval()


def find_model(path: str, option: str = "") -> None:
    """Refuse at once what is not a model: transformers would ask an unreachable hub again and again and name no fix.

    Args:
        path: a folder, or a name on the hub.
        option: the one that names it, for messages.

    Raises:
        UserError: neither a folder with safetensors nor a name in the cache or on the hub.
    """
    folder, given = Path(path), f"{option} {path}".strip()
    if not folder.is_dir():
        if path.count("/") > 1 or path.startswith((".", "/")) or folder.exists():
            raise UserError(
                f"{given}: is not a model folder; give one (ksub export), or a name such as xlm-roberta-base"
            )
        require_on_hub(given, path, "model", "config.json")
        cached = cached_folder(path)
        if cached is None:
            return
        folder = cached
    from ksub_ds.model.loading import refuse_adapter

    if is_run(folder) and not (folder / "config.json").is_file():
        raise UserError(f"{given}: is a run folder; `ksub export {path} --out MODEL` makes a model folder of it")
    refuse_adapter(given, folder)
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        raise UserError(
            f"{given}: holds pickled weights only (*.bin), which are never loaded; where you trust them, open the "
            "model in transformers and save it anew: save_pretrained writes safetensors"
        )


def check_encoder(model: str) -> None:
    """Refuse a model that cannot classify as an encoder does, before anything is read or written.

    Raises:
        UserError: not a model, or a decoder, an encoder-decoder, or an architecture without a classifier.
    """
    from transformers.models.auto import modeling_auto

    from ksub_ds.model.loading import has_causal_form, has_masked_form

    find_model(model, "--model")
    config = read_config(model)
    kind, masked = None, has_masked_form(config)
    if getattr(config, "is_encoder_decoder", False) and not masked:
        kind = "an encoder-decoder"
    elif has_causal_form(config) and not masked:
        kind = "a decoder"
    elif type(config) not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = "a model that transformers has no sequence classifier for"
    if kind is not None:
        raise UserError(
            f"--model {model}: is {kind} ({config.model_type}); give an encoder, such as a folder of ksub export or "
            "xlm-roberta-base"
        )


def _draw_head(model: Any) -> None:
    """Draw new values for the linear layers of the head, as transformers does."""
    from torch import nn

    for name, module in model.named_modules():
        if name.split(".")[0] in FRESH_HEADS and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _load(path: str, num_labels: int | None, option: str = "") -> tuple[Any, bool]:
    """Open a model.

    Args:
        path: folder or name.
        num_labels: outputs of a new head; None = the folder must have a trained one.
        option: the one that names it, for messages.

    Returns:
        The model, and whether the folder had a trained head.

    Raises:
        UserError: not a model, a damaged one, or one without the head it must have.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from ksub_ds.model.loading import quiet_transformers
    from ksub_ds.model.registration import register

    register()
    find_model(path, option)
    given = f"{option} {path}".strip()
    settings = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    with quiet_transformers():
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                **settings,
            )
        except Exception as error:  # the library raises many kinds
            reason = one_line(error)
            raise UserError(f"{given}: transformers cannot open this model ({reason})") from error
    missing = sorted(key for key in info["missing_keys"] if not set(key.split(".")) & set(HEADS))
    if missing:
        raise UserError(
            f"{given}: {len(missing)} weights are absent, for example {missing[0]!r}; the folder is damaged"
        )
    reshaped = {key for key, *_ in info["mismatched_keys"]}  # a head for other classes
    unfit = sorted(key for key in reshaped if key.split(".")[0] not in FRESH_HEADS)
    if unfit:
        raise UserError(f"{given}: {unfit[0]!r} is not of the shape that config.json gives; the folder is damaged")
    trained = not any(key.split(".")[0] in FRESH_HEADS for key in set(info["missing_keys"]) - reshaped)
    if num_labels is None and not trained:
        raise UserError(f"{given}: has no trained classification head; give a fine-tuned checkpoint")
    return model, trained


def open_encoder(model: str, tokenizer: str | None) -> PairEncoder:
    """Open the tokenizer given, or the model folder's own.

    Raises:
        UserError: there is no such model or tokenizer; the model's folder holds none, and none is given.
    """
    find_model(model, "--model")
    return load_encoder(tokenizer_source(model, tokenizer))


def tokenizer_source(model: str, given: str | None) -> str:
    """Return where a model's tokenizer is: the one given, or that of the model.

    Args:
        model: a folder, or a name on the hub.
        given: a folder, a SentencePiece .model or a name on the hub.

    Raises:
        UserError: the model's folder holds none, and none is given; or there is none of the name given.
    """
    folder = Path(model)
    if given is None and folder.is_dir() and not holds_tokenizer(folder):
        raise UserError(f"--model {model}: holds no tokenizer; give --tokenizer FOLDER or a SentencePiece .model")
    if given is not None and not Path(given).exists():
        require_on_hub(f"--tokenizer {given}", given, "model", "tokenizer_config.json")
    return given or model


def check_fit(model: str, encoder: PairEncoder, max_length: int) -> None:
    """Refuse a tokenizer with more tokens than the model, and rows longer than its positions.

    Args:
        model: folder or name on the hub.
        encoder: its tokenizer's.
        max_length: most tokens of a row, special ones included.

    Raises:
        UserError: either is too large; both numbers are named.
    """
    config = read_config(model)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and encoder.vocab_size > vocabulary:
        raise UserError(
            f"--tokenizer: has {encoder.vocab_size:,} tokens, but {model} only {vocabulary:,}; give the model's own"
        )
    longest = longest_sequence(config)
    if longest is not None and max_length > longest:
        raise UserError(f"--max-length {max_length}: {model} has positions for {longest} tokens; give that or less")


def describe(model: str) -> dict[str, Any]:
    """Describe a model for the results: path, fingerprint of its files, architecture, kind of embedding.

    Kind is "plain" (one row a token), "positional" (Algorithm 1) or "clustered" (other codes).
    """
    config = read_config(model)
    about: dict[str, Any] = {
        "path": str(model),
        "fingerprint": fingerprint(model, config),
        "architecture": config.model_type,
        "num_tokens": getattr(config, "vocab_size", None),
        "kind": "plain",
    }
    for key in ("num_hidden_layers", "hidden_size"):
        about[key] = getattr(config, key, None)
    sizes = getattr(config, "table_sizes", None)
    if sizes is not None:
        about |= {"num_tables": len(sizes), "table_sizes": list(sizes)}
        about["kind"] = "plain" if len(sizes) == 1 else _kind_of_codes(Path(model), list(sizes))
        if config.num_dedicated:  # none of the paper's models, whose results stand beside those of its kinds
            about |= {"num_dedicated": config.num_dedicated, "kind": f"{about['kind']}, with dedicated rows"}
    return about


def _kind_of_codes(folder: Path, sizes: list[int]) -> str:
    """Return "positional" if the codes among the weights are the digits of the token id, else "clustered".

    Raises:
        UserError: a file of weights is damaged.
    """
    import numpy as np

    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    name = next((name for name in files.shapes if name.endswith(".codes")), None)
    if name is None:
        return "unknown"
    codes = files.read(name)
    ids, digits = np.arange(len(codes)), []
    for size in sizes:
        digits.append(ids % size)
        ids = ids // size
    return "positional" if np.array_equal(np.stack(digits, axis=1), codes) else "clustered"


def fingerprint(model: str, config: Any = None) -> str:
    """Return the sha256 over configuration and weights of a folder; of a hub model its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return f"commit {getattr(config or read_config(model), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def read_config(model: str) -> Any:
    """Read the configuration of a model, without code of its own.

    Raises:
        UserError: transformers finds none.
    """
    from transformers import AutoConfig

    from ksub_ds.model.loading import quiet_transformers
    from ksub_ds.model.registration import register

    register()
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = one_line(error)
        raise UserError(f"--model {model}: transformers finds no model there ({reason})") from error

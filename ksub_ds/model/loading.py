"""Opening a trained model by folder or name: one of ours, or a plain one that can be compressed.

Published models come with heads that are not read (ELECTRA's discriminator, next sentences), or without the head that
config.json names. Their encoder is taken, and a line says so.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, refuse_stand_in
from ksub_ds.common.logging import get_logger
from ksub_ds.model.registration import register
from ksub_ds.model.replacement import CLASSES

TWO_HEADS = {"BertForPreTraining": "BertForMaskedLM"}  # that for next sentences is left out
OTHER_HEAD = re.compile(r"(?P<family>\w+)For(?!CausalLM)[A-Z]\w+")
COUNTERS = {"position_ids", "token_type_ids"}  # buffers 0, 1, 2, ... that older versions stored
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
ADAPTER = "adapter_config.json"  # of PEFT
BIDIRECTIONAL = ("xlnet",)  # sees both sides, though transformers counts it among the causal ones
NAMED = 3  # weights or modules named in a message


def _classes() -> dict[str, Any]:
    """Return the plain classes and ours, by name."""
    return {each.__name__: each for pair in CLASSES.items() for each in pair}


def open_config(name: str | Path) -> PretrainedConfig:
    """Read the configuration of a model that can be compressed, from a folder or by its name.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    register()
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name}: is a file; give the folder of the model, {path.parent}")
    refuse_adapter(str(name), path)
    if path.is_dir() and not (path / "config.json").is_file():
        inside = next((each.parent.name for each in sorted(path.glob("*/config.json")) if _is_model(each.parent)), None)
        raise UserError(f"{name}: holds no config.json; give {path / inside if inside else 'the folder of a model'}")
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not path.exists() and re.search("couldn't connect|Repo id must", str(error)):  # also where it did not try
            raise UserError(
                f"{name}: is neither a folder nor a model in the hub's cache, and the hub cannot be asked for it; "
                "check the name, or give a folder"
            ) from error
        raise UserError(f"{name}: transformers finds no model it knows there ({_first_line(error)})") from error
    except Exception as error:  # what config.json holds is anything; transformers raises as many kinds
        raise UserError(f"{name}: its config.json is damaged ({_kind_and_line(error)}); get the model anew") from error
    _check_fields(config, name)
    names = config.architectures or []
    if not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise UserError(f"{name}: architectures of its config.json are not a list of names; get the model anew")
    if _class_to_open(config) is None:
        wanted = (config.architectures or [f"model of type {config.model_type}"])[0]
        families = "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT or ModernBERT"
        raise UserError(
            f"{name}: is a {wanted}; give an encoder of {families}, or a causal model: Llama, Mistral, Qwen3, Gemma 3 "
            "(text) or GPT-2; bare or with a head (one of an unknown kind is left out)"
        )
    return config


def _check_fields(config: PretrainedConfig, name: str | Path) -> None:
    """Check what would be taken in silence, or fail without naming the field.

    Raises:
        UserError: a size below 1, or weights that are quantised.
    """
    for field in SIZES:
        size = getattr(config, field, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"{name}: {field} of its config.json is {size}; must be at least 1")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{name}: is quantised (quantization_config of its config.json); give the model as it was before, or save "
            "it anew after dequantize()"
        )


def has_masked_form(config: PretrainedConfig) -> bool:
    """Return whether transformers has a masked language model of this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING


def has_causal_form(config: PretrainedConfig) -> bool:
    """Return whether transformers has a causal language model of this configuration, one that sees one side only."""
    return type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in BIDIRECTIONAL


def refuse_adapter(given: str, folder: Path) -> None:
    """Refuse a folder of PEFT, which holds what was added to a model and not the model.

    Args:
        given: what the user gave, for the message.
        folder: where its files lie.

    Raises:
        UserError: it is one, with what to do.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return
    try:
        about = read_json(path)
        base, kind = str(about["base_model_name_or_path"])[:200], str(about.get("peft_type"))[:20]
    except (UserError, AttributeError, KeyError, TypeError):
        base, kind = "BASE", "PEFT"
    raise UserError(
        f"{given}: is a {kind} adapter ({ADAPTER}) of {base}, not a model; merge them and give the result: "
        f"PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained('{base}'), '{folder}').merge_and_unload()"
        ".save_pretrained('MERGED'), and the tokenizer beside it"
    )


def open_model(name: str | Path) -> PreTrainedModel:
    """Open a model that can be compressed, from safetensors only and without its own code.

    What a published model has besides (heads of other kinds) is left out, and what it lacks (the head that its
    config.json names, a pooler) is not made up: the encoder is opened, and a line says so.

    Raises:
        UserError: as `open_config`, only pickled weights, or weights of the encoder are absent.
    """
    config = open_config(name)
    model_class = _class_to_open(config)
    model, missing, unused = _load(name, model_class)
    head = {weight for weight in missing if not weight.startswith(f"{model.base_model_prefix}.")}
    if head and model is not model.base_model and _has_no_head(model, head):
        model_class = type(model.base_model)
        model, missing, unused = _load(name, model_class)
    bare = model is model.base_model
    pooler = {weight for weight in missing if bare and weight.startswith("pooler.")}
    if missing - pooler:
        raise UserError(
            f"{name}: {len(missing - pooler)} weights of a {model_class.__name__} are absent "
            f"({_some(missing - pooler)}); the folder is damaged, or its config.json is of another model"
        )
    if pooler:
        model.pooler = None
    wanted = (config.architectures or [model_class.__name__])[0]
    left_out = {weight.rpartition(".")[0] for weight in unused if weight.rpartition(".")[2] not in COUNTERS}
    if wanted != model_class.__name__ or left_out:
        without = f", without {_some(left_out)}" if left_out else ""
        get_logger().info(f"{name}: a {wanted}, read as {model_class.__name__}{without}")
    return model.eval()


def _class_to_open(config: PretrainedConfig) -> Any:
    """Return the class to read a model with; None if it is of a kind that is not read."""
    classes = _classes()
    if not config.architectures:  # older folders do not say; should the head be absent, the encoder is taken
        doors = (AutoModelForMaskedLM, AutoModelForCausalLM)
        guess = next(filter(None, (door._model_mapping.get(type(config), None) for door in doors)), None)
        return classes.get(getattr(guess, "__name__", ""))
    wanted = config.architectures[0]
    other = OTHER_HEAD.fullmatch(wanted)
    named = TWO_HEADS.get(wanted, wanted)
    return classes.get(named) or classes.get(f"{other['family']}Model" if other else "")


def _has_no_head(model: PreTrainedModel, missing: set[str]) -> bool:
    """Return whether nothing of a model's head was stored."""
    prefix = f"{model.base_model_prefix}."
    tied = set(model.all_tied_weights_keys)
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)} - tied <= missing


def _load(name: str | Path, model_class: Any) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Return a model, the names of weights it has but the folder has not, and of those that only the folder has.

    Raises:
        UserError: it cannot be read, or is pickled.
    """
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(str(name), **options)
    except ValueError as error:  # our own check of the codes, say
        raise UserError(f"{name}: cannot be read ({_first_line(str(error).removeprefix(f'{name}: '))})") from error
    except (OSError, SafetensorError) as error:
        _refuse_damaged_weights(Path(name))
        raise UserError(
            f"{name}: cannot be read ({_first_line(error)}); weights must be safetensors: pickled ones are not read, "
            "save them anew with save_pretrained() in a place you trust"
        ) from error
    except Exception as error:  # an index that is none, a field of config.json that no model has
        raise UserError(f"{name}: its files are damaged ({_kind_and_line(error)}); get the model anew") from error
    if info["mismatched_keys"]:
        weight, stored, made = max(info["mismatched_keys"], key=lambda each: (math.prod(each[1]), each[0]))
        raise UserError(
            f"{name}: {weight} is {_shape(stored)} in its weights and {_shape(made)} by its config.json; one of them "
            "is of another model"
        )
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _refuse_damaged_weights(folder: Path) -> None:
    """Name the file of weights that is damaged, if one is.

    Raises:
        UserError: one is.
    """
    for path in sorted(folder.glob("*.safetensors")):
        refuse_stand_in(path)
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is truncated or damaged ({_first_line(error)}); get it anew") from error


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bar, and its report of weights that a model lacks or does not use.

    The caller says what matters of them.

    Yields:
        Nothing.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _some(names: set[str]) -> str:
    """Name a few of many."""
    first = sorted(names)[:NAMED]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + more


def _kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception | str) -> str:
    return str(error).strip().split("\n")[0][:200].rstrip(". ")

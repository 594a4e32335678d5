"""Our models under PEFT's adapters: default layers for LoRA and its kin, and the embedding that an adapter replaced.

PEFT is never imported here; nothing happens in a process that does not use it.
"""

import sys
from typing import Any

from torch import nn

# Types that PEFT has no defaults for, plain ones included: their attention's projections, as it chooses elsewhere.
LORA_TARGETS = {"ksub_distilbert": ["q_lin", "v_lin"], "ksub_modernbert": ["Wqkv"]}


def offer_target_modules(model_type: str) -> None:
    """Give one of our types the default `target_modules` that PEFT has for the plain type, for each of its methods.

    Args:
        model_type: of the configuration: "ksub_roberta" has the defaults of "roberta".
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    plain = model_type.removeprefix("ksub_")
    for name, defaults in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and plain in defaults:
            defaults.setdefault(model_type, defaults[plain])
    if model_type in LORA_TARGETS:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, LORA_TARGETS[model_type])


def active_module(model: nn.Module, name: str) -> Any:
    """Return a module, or the trainable copy that PEFT's `modules_to_save` put in its place.

    Args:
        model: that holds the module.
        name: of the module, or of the original that PEFT keeps beside the copies.
    """
    owner, _, last = name.rpartition(".")
    wrapper: Any = model.get_submodule(owner)
    if last == "original_module" and not wrapper.disable_adapters and wrapper.active_adapters:
        return wrapper.modules_to_save[wrapper.active_adapters[0]]
    return model.get_submodule(name)

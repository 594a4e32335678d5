"""Names of the HuggingFace hub, refused within seconds: its clients ask an unreachable hub for half a minute a file."""

from pathlib import Path
from typing import Literal

from ksub_ds.common.errors import UserError

HUB_SECONDS = 10


def require_on_hub(what: str, name: str, kind: Literal["model", "dataset"], file: str) -> None:
    """Refuse what is neither in the local cache nor on the hub.

    Args:
        what: how the message calls it.
        name: such as xlm-roberta-base or facebook/xnli.
        file: one that the cache holds if it holds the repository.

    Raises:
        UserError: no such name, or nobody to ask.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str) or _prepared(name, kind):
            return
        if not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
            return
        reason = "HF_HUB_OFFLINE is set"
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"{what}: is neither a folder nor a {kind} on the hub; check the name") from None
    except Exception as error:  # of the HTTP library, which changes
        reason = " ".join(str(error).split())[:100]
    raise UserError(f"{what}: is no folder, not in the hub's cache, and the hub cannot be asked ({reason})")


def _prepared(name: str, kind: str) -> bool:
    """Whether `datasets` keeps the data set in its own cache."""
    if kind != "dataset":
        return False
    from datasets import config

    folder = name.replace("/", "___").lower()
    return any(each.name.lower() == folder for each in Path(config.HF_DATASETS_CACHE).glob("*"))

"""From what a user gives as a tokenizer to a file or folder that holds one.

A path, a file of a tokenizer folder, or a model's name on the Hugging Face Hub that lies in the local cache. Nothing is
downloaded. What a failed download leaves in a file's place is named.
"""

import re
from pathlib import Path

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import refuse_stand_in

# The names that transformers gives to a SentencePiece model, by family.
SENTENCEPIECE_NAMES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "spm.model",
    "sentencepiece.model",
)
DESCRIPTION = "tokenizer.json"
_OWN_NAMES = (DESCRIPTION, "tokenizer_config.json", "vocab.json", "vocab.txt")  # any of these is a tokenizer's alone
_OTHER_NAMES = ("special_tokens_map.json", "added_tokens.json", "merges.txt")
_MODEL_CONFIG = "config.json"  # of the model, beside its tokenizer; it may say which class that has
# All that transformers may save of a tokenizer.
TOKENIZER_FILES = (*SENTENCEPIECE_NAMES, *_OWN_NAMES, *_OTHER_NAMES, "chat_template.jinja")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".model", ".json", ".txt", ".npy", ".safetensors", ".bin", ".pt")
_FORMS = "a SentencePiece .model file or a HuggingFace tokenizer folder"


def locate(given: str | Path) -> Path:
    """Return the file or folder of a tokenizer.

    Args:
        given: a file, a folder, a file of a tokenizer folder (`X/tokenizer.json`), or a model's name on the hub.

    Returns:
        An existing .model file or folder.

    Raises:
        UserError: there is none, or it is not what its name says.
    """
    path = Path(given)
    if path.is_file() and path.name in (*_OWN_NAMES, *_OTHER_NAMES, _MODEL_CONFIG):
        path = path.parent
    if not path.exists():
        path = _cached(str(given))
    for file in [path] if path.is_file() else _present(path, (*TOKENIZER_FILES, _MODEL_CONFIG)):
        refuse_stand_in(file)
    return path


def sentencepiece_files(folder: Path) -> list[Path]:
    """Return the SentencePiece models in a folder, by the names that transformers knows."""
    return _present(folder, SENTENCEPIECE_NAMES)


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a file that only tokenizers have."""
    return bool(_present(folder, SENTENCEPIECE_NAMES + _OWN_NAMES))


def is_hub_name(name: str) -> bool:
    """Return whether a string may be a model's name on the Hugging Face Hub, such as FacebookAI/xlm-roberta-base."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.endswith(_FILE_SUFFIXES)


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _cached(name: str) -> Path:
    """Return the folder of a model in the local cache of the Hugging Face Hub.

    Raises:
        UserError: it is not there.
    """
    if not is_hub_name(name):
        raise UserError(f"{name}: no such tokenizer; give {_FORMS}")
    from huggingface_hub import constants, snapshot_download

    command = f"hf download {name} --include '*.json' --include '*.model' --include '*.txt'"
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no such tokenizer, neither a file or folder nor a model in the cache {constants.HF_HUB_CACHE}; "
            f"give {_FORMS}, or fetch it: {command}"
        ) from error
    if not holds_tokenizer(folder):
        raise UserError(f"{name}: lies in the cache ({folder}) without its tokenizer; fetch it: {command}")
    return folder

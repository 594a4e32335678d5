"""What the files of a folder say of the tokenizer in it: its class, and what makes it other than XLM-R's.

A SentencePiece model alone does not tell which id a piece has. XLM-R's, CamemBERT's and mBART's models look alike, and
tokens may have been added to each; tokenizer_config.json, config.json, added_tokens.json and special_tokens_map.json
tell them apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.corpus.tokenizers.xlmr import SPECIAL_TOKENS

XLMR_CLASS = "XLMRobertaTokenizer"
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")  # classes without a layout of their own
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>"}
_NAMES |= {"cls_token": "<s>", "mask_token": "<mask>"}
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Declaration:
    """What a folder says of its tokenizer.

    Attributes:
        class_name: transformers' class, without "Fast" at the end; None if no file tells.
        config: tokenizer_config.json.
        special: special_tokens_map.json.
        added: added_tokens.json.
    """

    class_name: str | None
    config: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, Any]

    @property
    def is_generic(self) -> bool:
        """Whether tokenizer.json alone decides."""
        return self.class_name in _GENERIC

    @property
    def is_other_class(self) -> bool:
        """Whether the class lays out the ids of a SentencePiece model in another way than XLM-R's."""
        return self.class_name not in (None, XLMR_CLASS, *_GENERIC)

    def unlike_xlmr(self, mask_id: int) -> str | None:
        """Return what makes the tokenizer other than XLM-R's with the same model; None if it is XLM-R's."""
        if self.class_name not in (None, XLMR_CLASS):
            return f"its class is {self.class_name}"
        usual_ids = {token: str(index) for token, index in {**SPECIAL_TOKENS, "<mask>": mask_id}.items()}
        for token, number in self._numbered():
            if token is None or usual_ids.get(token) != number:
                return f"{token!r} is token {number}"
        for facts in (self.config, self.special):
            for key, usual in _NAMES.items():
                token = _content(facts.get(key))
                if token not in (usual, None):
                    return f"{key} is {token!r}"
            for entry in (entry for key in _LISTS for entry in _entries(facts.get(key))):
                token = _content(entry)
                if token not in (*SPECIAL_TOKENS, "<mask>"):
                    return f"{token!r} is a special token"
        return "add_prefix_space is false" if self.config.get("add_prefix_space") is False else None

    def _numbered(self) -> Iterator[tuple[str | None, str]]:
        decoder = self.config.get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            yield _content(entry), number
        for token, number in self.added.items():
            yield token, str(number)


def read_declaration(folder: Path) -> Declaration:
    """Read what the files of a folder say.

    Raises:
        UserError: a file is damaged.
    """
    config, model = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not name and model.get("model_type"):
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

        name = TOKENIZER_MAPPING_NAMES.get(str(model["model_type"]))
    name = str(name).removesuffix("Fast") if name else None
    special, added = _read(folder / "special_tokens_map.json"), _read(folder / "added_tokens.json")
    return Declaration(name, config, special, added)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object; get it anew")
    return content


def _content(entry: object) -> str | None:
    """Return the text of a token, written as itself or as an object with its properties."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return None if content is None else str(content)


def _entries(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []

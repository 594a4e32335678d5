"""Tokenizers as causal models have them: with a start token, with an end token only, with neither."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TEXTS = ["the small old house. A green bird sings", "το μικρό σπίτι κοντά στο ποτάμι", "bir küçük eski ev, ama yavaşça"]


@pytest.fixture(scope="session")
def make_causal_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a byte-level BPE tokenizer with these special tokens: `make(bos_token="<s>")`."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    def make(**special: str) -> Path:
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(TEXTS * 5, vocab_size=320, special_tokens=sorted(set(special.values())))
        folder = tmp_path_factory.mktemp("tokenizer")
        backend = Tokenizer.from_str(trained.to_str())
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
        assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
        return folder

    return make

"""Finding a tokenizer: files, folders, names in the hub's cache; what a failed download leaves is named."""

import shutil
from pathlib import Path

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.convert.source import copy_tokenizer_files
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 5069051\n"
)
PAGE = "\n<!DOCTYPE html><html><head><title>Hugging Face</title></head></html>"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, source: Path) -> None:
    """Put a folder into the cache, as `hf download` lays it out: names that are links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (repository / "snapshots" / revision / file.name).symlink_to(repository / "blobs" / f"blob-{file.name}")


def test_a_file_of_a_folder_stands_for_it(tiny_bpe: Path) -> None:
    expected = load_tokenizer(tiny_bpe).fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert load_tokenizer(tiny_bpe / name).fingerprint == expected


def test_a_name_in_the_cache(tiny_tokenizer: Path, tiny_bpe: Path, cache: Path) -> None:
    put(cache, "someone/multi-lingual", tiny_tokenizer.parent)
    put(cache, "small-bpe", tiny_bpe)
    assert load_tokenizer("someone/multi-lingual").fingerprint == load_tokenizer(tiny_tokenizer).fingerprint
    assert load_tokenizer(Path("small-bpe")).fingerprint == load_tokenizer(tiny_bpe).fingerprint


def test_a_name_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"someone/model: no such tokenizer.* fetch it: hf download someone/model") as e:
        load_tokenizer("someone/model")
    assert str(cache) in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    put(cache, "someone/weights", tmp_path / "weights")
    with pytest.raises(UserError, match=r"without its tokenizer; fetch it: hf download someone/weights"):
        load_tokenizer("someone/weights")
    for absent in ("some.model", "/absent/folder", "../absent", "a/b/c", "x/tokenizer.json"):
        with pytest.raises(UserError, match=r"no such tokenizer; give a SentencePiece \.model file"):
            load_tokenizer(absent)


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "is a Git LFS pointer.*git lfs pull"), (PAGE, "is a web page")]
)
def test_what_a_failed_download_leaves(content: str, said: str, tiny_bpe: Path, tmp_path: Path) -> None:
    for name in ("sentencepiece.bpe.model", "tokenizer.json", "added_tokens.json"):
        folder = shutil.copytree(tiny_bpe, tmp_path / name)
        (folder / name).write_text(content)
        for given in (folder, folder / name):
            with pytest.raises(UserError, match=f"{name}: {said}"):
                load_tokenizer(given)


def test_all_files_of_a_vocabulary_are_copied(tmp_path: Path) -> None:
    """GPT-2's two files, and DeBERTa's model, which none of our tokenizers opens."""
    names = {"vocab.json", "merges.txt", "spm.model"}
    (tmp_path / "there").mkdir()
    for name in names | {"config.json", "model.safetensors"}:
        (tmp_path / name).write_text("x")
    copy_tokenizer_files(tmp_path, tmp_path / "there")
    assert {path.name for path in (tmp_path / "there").iterdir()} == names

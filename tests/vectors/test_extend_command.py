"""`ksub codes extend`: a file of tokens in, a code file out; mistakes are one line."""

import re

import numpy as np
import pytest

from ksub_ds import CodeTable, positional_codes
from ksub_ds.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    positional_codes(100, 3).save("codes.safetensors")
    (tmp_path / "new.txt").write_text("Zürich\r\n水\nfoo\n", encoding="utf-8")
    return tmp_path


COMMAND = ["codes", "extend", "codes.safetensors", "--tokens", "new.txt", "--out", "bigger.safetensors"]


def test_the_command_as_written(folder, capsys):
    assert main(COMMAND) == 0
    assert "103 tokens, tables of 5 5 5 rows" in capsys.readouterr().out
    table = CodeTable.load("bigger.safetensors")
    assert (table.codes == positional_codes(103, 3).codes).all() and table.metadata["added_tokens"] == "3"


def test_with_vectors(folder):
    draw = np.random.default_rng(0)
    known = draw.standard_normal((100, 8)).astype(np.float32)
    np.save("old.npy", known)
    table = CodeTable.load("codes.safetensors")
    leaves = np.unique(table.codes[:, :2], axis=0, return_inverse=True)[1].reshape(-1)
    centre = known[leaves == leaves[0]].mean(axis=0)
    np.save("new.npy", np.stack([centre] * 3) + 1e-3)
    assert main([*COMMAND, "--vectors", "new.npy", "--embeddings", "old.npy"]) == 0
    assert (CodeTable.load("bigger.safetensors").codes[100, :2] == table.codes[0, :2]).all()


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (
            b"\n".join(b"%d" % number for number in range(26)),
            [],
            "26 new tokens, but of 125 codes .* only 25 are unused",
        ),
        (b"a\n\nb\n", [], "line 2 is empty"),
        (b"a\nb\na\n", [], "line 3 repeats 'a' of line 1"),
        (b"", [], "holds no token"),
        (b"\xff\xfe", [], "is not UTF-8"),
        (None, [], "cannot be read"),
        (b"a\n", ["--vectors", "new.npy"], "give both"),
        (b"a\n", ["--vectors", "two.npy", "--embeddings", "old.npy"], "2 rows for 1 new tokens"),
        (b"a\n", ["--vectors", "one.npy", "--embeddings", "two.npy"], "2 vectors for 100 old tokens"),
        (b"a\n", ["--vectors", "wide.npy", "--embeddings", "old.npy"], "width 5, --embeddings has 4"),
        (b"a\n", ["--tokenizer", "nothing"], "no such tokenizer"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, content, more, message):
    for name, shape in {"old": (100, 4), "one": (1, 4), "two": (2, 4), "wide": (1, 5)}.items():
        np.save(f"{name}.npy", np.zeros(shape))
    (folder / "new.txt").unlink()
    if content is not None:
        (folder / "new.txt").write_bytes(content)
    assert main([*COMMAND, *more]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and not (folder / "bigger.safetensors").exists()
    assert re.search(message, error), error


def test_a_token_of_the_tokenizer_is_refused(folder, tiny_tokenizer, capsys):
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    loaded = load_tokenizer(tiny_tokenizer)
    positional_codes(loaded.vocab_size, 3).save("codes.safetensors")
    (folder / "new.txt").write_text(f"new\n{loaded.tokens()[40]}\n", encoding="utf-8")
    assert main([*COMMAND, "--tokenizer", str(tiny_tokenizer)]) == 2
    assert f"{loaded.tokens()[40]!r} is token 40 of" in capsys.readouterr().err

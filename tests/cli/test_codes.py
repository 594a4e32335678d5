"""`ksub codes` as a user types it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ksub_ds.cli import main


def test_positional_then_inspect(tmp_path, capsys):
    path = str(tmp_path / "codes.safetensors")
    assert main(["codes", "positional", "--num-tokens", "250002", "--num-tables", "3", "--out", path]) == 0
    assert main(["codes", "inspect", path]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "63 63 63",
        "99.98% of 250,047",
        "collisions             0",
        "against 128,001,024 plain: 3,968.3 times fewer",
    ):
        assert fact in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["codes", "positional", "--num-tables", "3", "--out", "x"], "give --num-tokens N or --tokenizer PATH"),
        (
            ["codes", "positional", "--num-tokens", "0", "--num-tables", "3", "--out", "x"],
            "--num-tokens 0 --num-tables 3:",
        ),
        (
            ["codes", "positional", "--num-tokens", "9", "--num-tables", "3", "--out", "x", "--data", "nowhere"],
            "--data nowhere: is read with --dedicated-rows F only; leave it out",
        ),
        (
            ["codes", "dedicate", "c.safetensors", "--tokens", "ids.txt", "--data", "nowhere", "--out", "x"],
            "--data nowhere: is read with --rows F only; leave it out",
        ),
        (
            ["codes", "positional", "--num-tokens", "9", "--num-tables", "2", "--out", "."],
            "--out .: is a folder; name a",
        ),
        (["codes", "inspect", "absent.safetensors"], "no such code file"),
        (["codes", "inspct", "x"], "did you mean `ksub codes inspect`"),
        (["codes", "zzz"], "no command 'codes zzz'; there are codes positional, "),
        (["pretrian"], "did you mean `ksub pretrain`"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_imports_no_torch_and_names_every_command():
    code = "import sys; sys.argv[0] = 'ksub'; from ksub_ds.cli import main; main(['--help'])\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("codes positional", "codes inspect", "corpus stats", "pretrain", "export"):
        assert f"ksub {command}" in done.stdout


def test_a_reader_that_has_seen_enough() -> None:
    """`ksub --help | true`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from ksub_ds.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("typed", "meant"), [("cods", "codes"), ("reprot x", "report"), ("corpus stat", "corpus stats")]
)
def test_a_mistyped_command_is_guessed(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed.split()) == 2
    assert f"did you mean `ksub {meant}`?" in capsys.readouterr().err
    assert main(["preflight", "--help"]) == 2 and "did you mean" not in capsys.readouterr().err


def test_only_code_files_are_replaced(tmp_path, capsys):
    out, tokens = tmp_path / "codes.safetensors", tmp_path / "tokens.txt"
    tokens.write_text("one\ntwo\n")
    make = ["codes", "positional", "--num-tokens", "90", "--num-tables", "2"]
    assert main([*make, "--out", str(tokens)]) == 2
    assert f"--out {tokens}: is there, and is no code file; name another file" in capsys.readouterr().err
    assert main([*make, "--out", str(out)]) == main([*make, "--out", str(out)]) == 0
    extend = ["codes", "extend", str(out), "--tokens", str(tokens)]
    for place in (out, tokens):
        assert main([*extend, "--out", str(place)]) == 2
        assert f"--out {place}: is read, and would be replaced; name another file" in capsys.readouterr().err
    assert tokens.read_text() == "one\ntwo\n"
    np.save(tmp_path / "equal.npy", np.ones((60, 4)))
    cluster = ["codes", "cluster", "--embeddings", str(tmp_path / "equal.npy"), "--num-tables", "2", "--out", str(out)]
    assert main([*cluster, "--table-size", "10"]) == 2 and "all its rows are equal" in capsys.readouterr().err
    np.save(tmp_path / "equal.npy", np.arange(240.0).reshape(60, 4))
    assert main([*cluster, "--table-size", "61"]) == 2
    assert "--table-size 61: is more than the 60 tokens" in capsys.readouterr().err

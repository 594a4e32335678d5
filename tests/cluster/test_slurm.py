"""SLURM: `sbatch launch/*.sbatch` on a real one, over two nodes."""

import gzip
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import BIN, ROOT, Cluster, losses, steps_done
from .namespaces import wait_until
from .slurm import Slurm

PRETRAIN = ROOT / "launch" / "pretrain.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SCANCEL = next(line.strip() for line in (ROOT / "docs" / "cluster.md").open() if line.startswith("    scancel"))
LONG = 400  # steps: long enough for something to happen before the end


def submit(slurm: Slurm, cluster: Cluster, name: str, *options: object, **settings: object) -> int:
    arguments = cluster.arguments(name, **settings)
    return slurm.submit(*TWO_NODES, *options, PRETRAIN, *arguments, cwd=cluster.folder)


def output(cluster: Cluster, number: int) -> str:
    return (cluster.folder / f"ksub-pretrain-{number}.log").read_text(errors="replace")


def wait_for_step(slurm: Slurm, cluster: Cluster, number: int, name: str, step: int) -> None:
    def trained() -> bool:
        assert slurm.job(number)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), output(cluster, number)
        return steps_done(cluster.folder / name) >= step

    wait_until(trained, f"step {step} of {name}", 240)


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm: Slurm, cluster: Cluster) -> None:
    """USR1, as --signal sends it: saved, requeued, continued without a word, and the same weights at the end."""
    number = submit(slurm, cluster, "requeued", max_steps=LONG, save_every_steps=LONG)
    wait_for_step(slurm, cluster, number, "requeued", 5)
    slurm.run("bash", "-c", f"job={number}\n{SCANCEL}")
    slurm.wait(number, Restarts="1", JobState="RUNNING")
    stopped = [int(p.name.removeprefix("global_step")) for p in (cluster.folder / "requeued/checkpoints").iterdir()]
    assert len(stopped) == 1 and 5 <= stopped[0] < LONG
    wait_for_step(slurm, cluster, number, "requeued", stopped[0] + 2)
    assert f"continuing from requeued/checkpoints/global_step{stopped[0]}" in output(cluster, number)
    slurm.run("scancel", number)
    slurm.wait(number)


def test_max_hours_goes_back_into_the_queue(slurm: Slurm, cluster: Cluster) -> None:
    """Time for one step in each start: the job comes back by itself until the last step."""
    number = submit(slurm, cluster, "hours", max_steps=2, max_hours=1e-9)
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(cluster, number)
    assert "--max-hours 1e-09 is over" in output(cluster, number)
    assert "continuing from hours/checkpoints/global_step1" in output(cluster, number)
    assert len(losses(cluster.folder / "hours")) == 2


def test_scancel_saves_and_ends(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "cancelled", max_steps=LONG, save_every_steps=LONG)
    wait_for_step(slurm, cluster, number, "cancelled", 3)
    slurm.run("scancel", number)
    assert slurm.wait(number)["JobState"] == "CANCELLED"
    for host in (1, 2):
        wait_until(lambda host=host: not cluster.workers(host, "cancelled"), "workers of a cancelled job", 60)
    saved = sorted((cluster.folder / "cancelled" / "checkpoints").glob("global_step*"))
    assert len(saved) == 1 and not (cluster.folder / "cancelled" / "STOP").exists()


def test_a_killed_rank_starts_again_within_the_job(slurm: Slurm, cluster: Cluster) -> None:
    """Submitted by `ksub submit`."""
    words = ["ksub", "submit", "--nodes=2", "--ntasks-per-node=1", "--time=00:30:00", "--job-name=mine", "--"]
    arguments = cluster.arguments("killed", max_steps=60)
    number = int(slurm.run(*words, *arguments, cwd=cluster.folder).stdout.split()[-1])
    output = cluster.folder / f"mine-{number}.log"
    wait_until(lambda: steps_done(cluster.folder / "killed") >= 5, "step 5", 240)
    os.kill(cluster.workers(2, "killed")[-1], signal.SIGKILL)
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "0", output.read_text()
    assert job["JobName"] == "mine" and job["TimeLimit"] == "00:30:00"
    assert "start 1 of 3 failed" in output.read_text()
    assert len(losses(cluster.folder / "killed")) == 60


def test_a_mistake_is_told_and_not_repeated(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "mistaken", codes="none.safetensors")
    job = slurm.wait(number)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0", output(cluster, number)
    last = output(cluster, number).strip().splitlines()[-1]
    assert last.startswith("error: ") and "none.safetensors" in last and "Traceback" not in output(cluster, number)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shard_cc(
    slurm: Slurm, cluster: Cluster, make_documents: Callable[..., list[str]], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Two tasks on two nodes, which meet by MPI, make the files of one process. Submitted from elsewhere."""
    wet = tmp_path / "wet"
    wet.mkdir()
    for number in range(2):
        pages = ["\n".join(make_documents(language, 8, seed=number)) for language in ("en", "el", "tr")]
        bodies = [page.encode() for page in pages]
        records = [
            f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://site/{number}/{index}\r\n"
            f"WARC-Date: 2019-02-16T07:20:43Z\r\nWARC-Record-ID: <urn:uuid:{number}-{index}>\r\n"
            f"WARC-Block-Digest: sha1:{number}{index}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
            for index, body in enumerate(bodies)
        ]
        (wet / f"CC-{number}.warc.wet.gz").write_bytes(
            b"".join(gzip.compress(record + b"\r\n\r\n", mtime=0) for record in records)
        )
    words = ["--input", wet, "--tokenizer", tiny_tokenizer, "--sequence-length", 64, "--validation-fraction", 0.1]
    job = slurm.submit(*TWO_NODES, ROOT / "launch" / "shard_cc.sbatch", *words, "--out", "two", cwd=tmp_path)
    script = ROOT / "preprocessing" / "shard_cc.py"
    alone = cluster.start(0, BIN / "python", script, *words, "--out", tmp_path / "one").finish()
    assert alone.code == 0, alone.text
    log = tmp_path / f"ksub-shard-cc-{job}.log"
    assert slurm.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert any(name.endswith(".arrow") for name in content(tmp_path / "two"))
    assert log.read_text().count("kept 6 of 6 pages") == 1  # two tasks that do not meet would say it twice


@pytest.fixture
def xnli(tmp_path: Path) -> Path:
    """A few rows in two languages; the label shows in the last word of the hypothesis."""
    draw = random.Random(0)
    words = ["the", "small", "old", "house", "river", "stone", "bird", "walks", "sings", "falls"]
    for language in ("en", "fr"):
        (tmp_path / "xnli" / language).mkdir(parents=True)
        for split, count in (("train", 24), ("validation", 6), ("test", 12)):
            rows = [
                {
                    "premise": " ".join(draw.choices(words, k=6)),
                    "hypothesis": f"{draw.choice(words)} {('today', 'slowly', 'but')[number % 3]}",
                    "label": number % 3,
                }
                for number in range(count)
            ]
            path = tmp_path / "xnli" / language / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "xnli"


@pytest.fixture
def model(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """A model of two layers with untrained weights, and its tokenizer."""
    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64)
    KSubRobertaForMaskedLM(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate(slurm: Slurm, xnli: Path, model: Path, tmp_path: Path) -> None:
    """Two tasks of an array share the jobs of one folder; the last one writes the results."""
    words = ["xnli", "--model", model, "--data", xnli, "--setting", "cross-lingual", "--epochs", 1, "--out", "results"]
    words += ["--languages", "en", "fr", "--cache", tmp_path / "cache"]
    array = slurm.submit("--array=0-1", ROOT / "launch" / "evaluate.sbatch", *words, cwd=tmp_path)
    assert slurm.wait_for_array(array) == ["COMPLETED"] * 2, [p.read_text() for p in tmp_path.glob("*.log")]
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {language: score["count"] for language, score in results["test"].items()} == {"en": 12, "fr": 12}
    queue = tmp_path / "results" / "queue"
    jobs = json.loads((queue / "plan.json").read_text())["jobs"]
    assert sorted(path.stem for path in (queue / "done").iterdir()) == sorted(jobs)
    assert all("cross-lingual" in (tmp_path / f"ksub-evaluate-{array}-{task}.log").read_text() for task in (0, 1))

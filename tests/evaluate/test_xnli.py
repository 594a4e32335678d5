"""XNLI from the command line: results' form, languages without training data, workers killed at random, ranks."""

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ksub_ds import positional_codes
from ksub_ds.cli import main
from ksub_ds.common.exit_codes import FAILED
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.evaluate.data.tasks import LANGUAGES
from ksub_ds.model.presets import fresh_model, preset_config

ROOT = Path(__file__).resolve().parents[2]


def arguments(model: Path, data: Path, out: Path, *more: object, setting: str = "cross-lingual") -> list[str]:
    fixed = ["--model", model, "--data", data, "--setting", setting, "--out", out, "--epochs", 2, "--batch-size", 16]
    return [str(part) for part in ["evaluate", "xnli", *fixed, "--learning-rate", 1e-3, *more]]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_results_have_the_agreed_form(tiny_model: Path, tiny_xnli: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_model, tiny_xnli, out, "--seeds", 0, 3, "--max-test-examples", 50)) == 0
    found = results(out)
    assert found["setting"] == "cross-lingual" and list(found["test"]) == ["en", "fr", "sw"]
    for scores in found["test"].values():
        assert scores["accuracy"] == scores["correct"] / scores["count"] and scores["count"] == 2 * 50
        assert scores["interval"][0] <= scores["accuracy"] <= scores["interval"][1]
    means = [scores["accuracy"] for scores in found["test"].values()]
    assert found["average"] == pytest.approx(sum(means) / 3)
    assert set(found["seeds"]) == {"0", "3"} and found["data"]["train_languages"] == ["en"]
    assert found["settings"]["select_on"] == "en" and found["settings"]["max_length"] == 128
    assert len(found["model"]["fingerprint"]) == len(found["data"]["fingerprint"]) == 64
    assert set(found["finetuning"]["0"]["epochs"][0]["validation"]) == {"en"}
    answers = json.loads((out / "predictions.json").read_text())
    english = zip(answers["predictions"]["3"]["en"], answers["labels"]["en"], strict=True)
    assert sum(a == b for a, b in english) == round(50 * found["seeds"]["3"]["accuracy"]["en"])
    printed = capsys.readouterr()
    assert "paper, positional" in printed.out and "no test set for de" not in printed.err
    header = next(line for line in printed.out.splitlines() if line.startswith("| model"))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [*LANGUAGES, "avg"]  # Table 4's order
    # again: nothing is left to do, nothing changes; other settings are refused
    before = (out / "results.json").read_bytes()
    assert main(arguments(tiny_model, tiny_xnli, out, "--seeds", 0, 3, "--max-test-examples", 50)) == 0
    assert (out / "results.json").read_bytes() == before
    assert main(arguments(tiny_model, tiny_xnli, out, "--seeds", 0, 3)) == 2
    assert "max_test_examples: 50 -> None" in capsys.readouterr().err
    assert main(["evaluate", "status", str(out)]) == 0
    assert "8 jobs: 8 done" in capsys.readouterr().out
    for damage in ('["test"]', '{"kind": "xnli", "jobs": ["test"]}', '{"kind": "xnli", "jobs": {"a": ["b"]}}'):
        (tmp_path / "damaged" / "queue").mkdir(parents=True, exist_ok=True)
        (tmp_path / "damaged" / "queue" / "plan.json").write_text(damage)
        assert main(["evaluate", "status", str(tmp_path / "damaged")]) == 2
        assert "plan.json: is damaged" in capsys.readouterr().err
    assert main(["report", str(out), "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out


def test_languages_without_data_are_named_and_left_out(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, caplog: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert (
        main(arguments(tiny_model, tiny_xnli, out, "--languages", "en", "fr", "sw", setting="translate-train-all")) == 0
    )
    found = results(out)
    assert found["data"]["train_languages"] == ["en", "fr"] and found["data"]["missing"]["train"] == ["sw"]
    assert found["finetuning"]["0"]["train_examples"] == 240 and "sw" in found["test"]
    assert set(found["finetuning"]["0"]["epochs"][0]["validation"]) == {"en", "fr", "sw"}
    assert "no train set for sw" in capsys.readouterr().out
    less = tmp_path / "less"
    shutil.copytree(tiny_xnli, less)
    (less / "en").rename(less / "eng")
    assert main(arguments(tiny_model, less, tmp_path / "none")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "holds no train set for en" in line and line.endswith("no language is called so: eng")


def test_another_family_and_its_attention(tiny_tokenizer: Path, tiny_xnli: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer, model = load_tokenizer(tiny_tokenizer), tmp_path / "model"
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = preset_config("small_modernbert", vocab_size=tokenizer.vocab_size, **size)
    fresh_model(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(model)
    tokenizer.save(model)
    for name in ("sdpa", "eager"):
        assert main(arguments(model, tiny_xnli, tmp_path / name, "--attention", name, "--languages", "en")) == 0
    ours, theirs = results(tmp_path / "sdpa"), results(tmp_path / "eager")
    assert ours["model"]["kind"] == "positional" and ours["settings"] == theirs["settings"]
    assert [each["finetuning"]["0"]["attention"] for each in (ours, theirs)] == ["sdpa", "eager"]
    losses = [[epoch["loss"] for epoch in each["finetuning"]["0"]["epochs"]] for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    if importlib.util.find_spec("flash_attn") is None:
        unable = ("--attention", "flash_attention_2", "--languages", "en")
        assert main(arguments(model, tiny_xnli, tmp_path / "flash", *unable)) == 2
        assert "--attention flash_attention_2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--learning-rate", "2"], "--learning-rate 2.0: must be above 0"),
        (["--seeds", "1", "1"], "give different numbers"),
        (["--languages", "xx"], "--languages xx: XNLI's are en, fr"),
        (["--max-length", "600"], "has positions for 512 tokens"),
        (["--data", "nowhere"], "--data nowhere: is not a folder"),
        (["--model", "nowhere/else/at/all"], "is not a model folder; give one"),
        (
            ["--model", "xlm-robrta-base"],
            r"is not a folder, not in the hub's cache, and the hub cannot be asked \(HF_HUB",
        ),
        (["--ranks-per-job", "999"], r"--ranks-per-job 999: this machine has \d+ (cores|GPUs)"),
        (["--ranks-per-job", "2", "--batch-size", "3"], "--ranks-per-job 2: does not divide the batch size 3"),
        (["--tokenizer", "tokn"], "--tokenizer tokn: is not a folder, not in the hub's cache"),
        (["--data", "facebok/xnli"], "--data facebok/xnli: is not a folder, not in the hub's cache"),
    ],
)
def test_mistakes_are_one_line(
    tiny_model: Path,
    tiny_xnli: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: list[str],
    message: str,
) -> None:
    import re

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = arguments(tiny_model, tiny_xnli, tmp_path / "out")
    if change[0] == "--model":
        del given[2:4]  # it is named once
    assert main([*given, *change]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and re.search(message, error[0])
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused_with_the_way_out(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(arguments(folder, tiny_xnli, tmp_path / "out")) == 2
    assert "holds pickled weights only (*.bin), which are never loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- workers that die


def _worker(command: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and children inherit that
    sys.exit(main(command))


def _start(command: list[str]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_worker, args=(command,))
    process.start()
    return process


@pytest.mark.timeout(240)
def test_two_workers_killed_at_random_give_the_same_results(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return arguments(tiny_model, tiny_xnli, out, "--seeds", 0, 1, "--save-every-steps", 5, "--epochs", 25)

    quiet = _start(command(tmp_path / "quiet"))
    quiet.join(120)
    assert quiet.exitcode == 0
    draw, out = random.Random(0), tmp_path / "out"
    killed = 0
    for _ in range(4):
        workers = [_start(command(out)) for _ in range(2)]
        for worker in workers:
            time.sleep(draw.uniform(0.1, 0.5))
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
                killed += 1
            worker.join()
    workers = [_start(command(out)) for _ in range(2)]
    for worker in workers:
        worker.join(120)
    assert killed >= 2 and [worker.exitcode for worker in workers] == [0, 0]
    for name in ("results.json", "predictions.json", "table.md"):
        assert (out / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes(), name
    assert len(list((out / "queue" / "done").glob("*.json"))) == 2 * (1 + 3)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_is_asked_to_end_gives_its_job_back(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    worker = _start(arguments(tiny_model, tiny_xnli, out, "--epochs", 500))
    deadline = time.monotonic() + 60
    while not list((out / "queue" / "claims").glob("finetune*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(worker.pid, number)
    worker.join(60)
    assert worker.exitcode == 128 + number and not list((out / "queue" / "claims").glob("finetune*"))


@pytest.mark.timeout(300)
def test_ranks_share_a_fine_tuning(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    """Two ranks by the DeepSpeed engine: the losses of one process, without dropout."""
    still = tmp_path / "still"
    shutil.copytree(tiny_model, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    few = ("--languages", "en", "--max-train-examples", 50)
    assert main(arguments(still, tiny_xnli, tmp_path / "one", *few)) == 0
    assert main(arguments(still, tiny_xnli, tmp_path / "two", *few, "--ranks-per-job", 2)) == 0
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    losses = [[epoch["loss"] for epoch in found["finetuning"]["0"]["epochs"]] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert one["test"] == two["test"]
    assert [found["finetuning"]["0"]["ranks"] for found in (one, two)] == [1, 2]


@pytest.mark.timeout(300)
def test_a_killed_rank_is_named_and_may_be_tried_again(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--languages", "en", "--epochs", 1000, "--save-every-steps", 1, "--ranks-per-job", 2]
    command = [sys.executable, "-m", "ksub_ds.evaluate", *arguments(tiny_model, tiny_xnli, out, *words)[1:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as worker:
        deadline = time.monotonic() + 200
        while not list((out / "work").glob("*/best.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.2)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        (rank_1,) = [each for each in children if "\0RANK=1\0" in Path(f"/proc/{each}/environ").read_text()]
        os.kill(int(rank_1), signal.SIGKILL)
        _, errors = worker.communicate(timeout=60)
    assert worker.returncode == FAILED, errors
    *others, last = errors.splitlines()
    assert last.startswith(
        "failed: finetune-seed0: its 2 ranks ended with exit codes 70, -9; their messages stand above"
    )
    assert any(line.startswith("failed: rank 1 on ") for line in others) and "Traceback" not in errors


@pytest.mark.timeout(240)
def test_launch_script_starts_workers_on_a_hostfile(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    script, hosts = ROOT / "launch" / "evaluate.sh", tmp_path / "a hostfile; $(touch hacked)"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def launch(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(script), "--hostfile", str(hosts), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)

    for content, message in ((None, "cannot be read"), ("", "names no host"), ("here", "line 1 is 'here'")):
        if content is not None:
            hosts.write_text(content)
        done = launch("status", "x")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    hosts.write_text("localhost slots=2\n")
    words = arguments(tiny_model, tiny_xnli, tmp_path / "my out", "--languages", "en", "--seeds", 0, 1)[1:]
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### XNLI") == 1 and results(tmp_path / "my out")["seeds"].keys() == {"0", "1"}
    assert not (tmp_path / "hacked").exists()

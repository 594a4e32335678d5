"""`--extend`: the same run goes on to more steps; under wsd as one that had the longer plan from the start."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.distributed import free_port
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import FAILED, USER_ERROR
from ksub_ds.common.files import read_json
from ksub_ds.common.watchdog import Failure
from ksub_ds.pretrain import checkpoint, run_folder
from ksub_ds.pretrain.checkpoint import checkpoints, step_of
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.pretrain.recipe import parse_recipe, resolve, to_json
from ksub_ds.pretrain.run_folder import RunFolder

from .runs import Bench, Outcome, environment, losses, metrics, state_bytes
from .test_open_run import write_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
WSD = {"schedule": "wsd", "warmup_steps": 2, "save_every_steps": 3, "eval_every": 3}
LAST = 12


def longer(run: Path, *words: Any) -> list[str]:
    """What a user types to go on: nothing that the run knows."""
    return ["--out", str(run), "--extend", *map(str, words)]


@pytest.fixture(scope="module")
def extended(bench: Bench) -> dict[str, list[Outcome]]:
    """Runs and their extensions, in one process."""
    plan = ("--max-steps", LAST, "--decay-steps", 4)
    half, decayed, linear = (bench.folder / name for name in ("wsd-half", "wsd-decayed", "linear-short"))
    starts = [
        ("whole", bench.arguments("wsd-whole", **WSD, max_steps=LAST, decay_steps=4)),
        ("half", bench.arguments("wsd-half", **WSD, max_steps=6, decay_steps=0)),
        ("half", longer(half, *plan)),
        ("half", longer(half, *plan)),  # once more, as a launcher does after a kill
        ("decayed", bench.arguments("wsd-decayed", **WSD | {"keep_last": 1}, max_steps=8, decay_steps=4)),
        ("decayed", longer(decayed, *plan)),
        ("linear", bench.arguments("linear-short", max_steps=6, warmup_steps=2, eval_every=0)),
        ("linear", bench.arguments("linear-short", max_steps=9, warmup_steps=2, eval_every=0)),
        ("linear", bench.arguments("linear-short", "--extend", max_steps=9, warmup_steps=2, eval_every=0)),
        ("linear", longer(linear, "--max-steps", 12, "--seed", 1)),
        ("linear", longer(linear, "--max-steps", 9)),
        ("end", longer(linear / "ends" / "step6", "--max-steps", 9)),
    ]
    outcomes = bench.run_all(1, [{"arguments": words} for _, words in starts])
    found: dict[str, list[Outcome]] = {}
    for (name, _), outcome in zip(starts, outcomes, strict=True):
        found.setdefault(name, []).append(outcome[0])
    return found


def test_an_extended_run_is_the_longer_run_bit_for_bit(bench: Bench, extended: dict[str, list[Outcome]]) -> None:
    assert extended["whole"] == [0] and extended["half"] == [0, 0, 0]
    whole, half = bench.folder / "wsd-whole", bench.folder / "wsd-half"
    assert losses(half) == losses(whole) and len(losses(half)) == LAST
    assert [line["lr"] for line in metrics(half)] == [line["lr"] for line in metrics(whole)]
    assert state_bytes(half, LAST) == state_bytes(whole, LAST)
    assert (half / "evaluation.jsonl").read_text() == (whole / "evaluation.jsonl").read_text()
    recipe = read_json(half / "recipe.json")
    assert recipe.pop("plans") == [
        {"from_step": 0, "max_steps": 6, "schedule": "wsd", "decay_steps": 0},
        {"from_step": 6, "max_steps": LAST, "schedule": "wsd", "decay_steps": 4},
    ]
    assert recipe | {"out": ""} == read_json(whole / "recipe.json") | {"out": ""}
    assert (half / "train.log").read_text().count("extended: 6 -> 12 steps; goes on from step 6\n") == 1
    assert not (half / "ends").exists(), "nothing was trained that the longer run would not have"


def test_a_decayed_run_goes_on_before_its_decay(bench: Bench, extended: dict[str, list[Outcome]]) -> None:
    """The checkpoint there outlives --keep-last, and the decayed model is kept as a run of its own."""
    assert extended["decayed"] == [0, 0]
    whole, run = bench.folder / "wsd-whole", bench.folder / "wsd-decayed"
    assert losses(run) == losses(whole)
    assert state_bytes(run, LAST) == state_bytes(whole, LAST)
    assert (run / "evaluation.jsonl").read_text() == (whole / "evaluation.jsonl").read_text()
    assert [step_of(path) for path in checkpoints(run / "checkpoints")] == [12, 8]
    assert (run / "LATEST").read_text() == "global_step12\n"
    end = open_run(run / "ends" / "step8")
    assert (end.recipe.max_steps, end.recipe.decay_steps, end.checkpoint().step) == (8, 4, 8)
    assert [line["step"] for line in end.metrics] == list(range(1, 9))
    assert end.metrics[-1]["lr"] < end.metrics[3]["lr"]
    assert end.checkpoint().load_model()


def test_other_schedules_go_on_with_the_new_rate_and_say_so(bench: Bench, extended: dict[str, list[Outcome]]) -> None:
    done, refused, again, seed, once_more = extended["linear"]
    assert (done, again, once_more) == (0, 0, 0)
    assert "(max_steps: 6 -> 9); give the old values, --extend to go on to another last step, or a new --out" in refused
    assert "(seed: 0 -> 1); give the old values, or a new --out" in seed
    run = bench.folder / "linear-short"
    assert [line["lr"] for line in metrics(run)][4:7] == pytest.approx([4e-4, 2e-4, 3.75e-4])
    log = (run / "train.log").read_text()
    assert (
        log.count("extended: 6 -> 9 steps; goes on from step 6; the learning rate goes from 0.0002 to 0.000375 in") == 1
    )
    assert read_json(run / "recipe.json")["plans"][1] == {"from_step": 6, "max_steps": 9, "schedule": "linear"}
    assert extended["end"] == [0], "a run that was set aside can go on as well"
    assert state_bytes(run / "ends" / "step6", 9) == state_bytes(run, 9)


def test_a_default_run_has_no_new_key(bench: Bench) -> None:
    recipe = to_json(parse_recipe(bench.arguments("plain")))
    assert not {"schedule", "decay_steps", "extend", "plans"} & recipe.keys()


# ---------------------------------------------------------------- without training


def identity(run: Path, *words: Any) -> dict[str, Any]:
    extension = resolve(parse_recipe(longer(run, *words)), 1, on_gpu=False)
    return to_json(extension)


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A wsd run of 100 steps that has decayed from step 90, with the checkpoints that are kept."""
    words = "--preset tiny --plain --schedule wsd --max-steps 100 --warmup-steps 10"
    folder = RunFolder(tmp_path / "run")
    for step in (90, 95, 100):
        write_checkpoint(folder.path, step)
    recipe = resolve(
        parse_recipe([*words.split(), "--data", str(tmp_path), "--out", str(folder.path)]), 1, on_gpu=False
    )
    folder.recipe.write_text(json.dumps(to_json(recipe)))
    return folder


def test_a_kill_while_extending_changes_nothing(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command extends once, wherever the first start ended."""
    wanted = identity(finished.path, "--max-steps", 200)
    before = finished.recipe.read_text()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def killed_before_the_newest(path: Path, **keywords: Any) -> None:
        if path.parent.name == "checkpoints" and path.name == "global_step100":
            raise KeyboardInterrupt
        rmtree(path, **keywords)

    rmtree = shutil.rmtree
    places: list[tuple[Any, str, Any]] = [
        (shutil, "copytree", killed),
        (shutil, "rmtree", killed_before_the_newest),
        (checkpoint, "name_latest", killed),
        (run_folder, "write_json", killed),
    ]
    for module, name, instead in places:
        copy = RunFolder(Path(shutil.copytree(finished.path, finished.path.with_name(f"killed in {name}"))))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, instead)
            copy.extend(wanted)
        assert copy.recipe.read_text() == before
        assert copy.extend(wanted) is not None
        assert copy.extend(wanted) is None
        assert [step_of(path) for path in checkpoints(copy.checkpoints)] == [90]
        assert [path.name for path in copy.ends.iterdir()] == ["step100"]
        plans = read_json(copy.recipe)["plans"]
        assert [(plan["from_step"], plan["max_steps"]) for plan in plans] == [(0, 100), (90, 200)]


def test_an_end_that_differs_gets_a_name_of_its_own(finished: RunFolder) -> None:
    finished.extend(identity(finished.path, "--max-steps", 100, "--decay-steps", 5))
    assert write_checkpoint(finished.path, 100).is_dir()
    manifest = finished.checkpoints / "global_step100" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # other weights
    told = finished.extend(identity(finished.path, "--max-steps", 200))
    assert told is not None and "step100-2" in told
    assert sorted(path.name for path in finished.ends.iterdir()) == ["step100", "step100-2"]
    plans = read_json(finished.recipe)["plans"]
    found = [(plan["from_step"], plan["max_steps"], plan["decay_steps"]) for plan in plans]
    assert found == [(0, 100, 10), (90, 100, 5), (90, 200, 5)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--extend: give --max-steps, the last step to go on to; the run has 100"),
        ("--max-steps 90", "--extend --max-steps 90: 90 steps are done; give more"),
        (
            "--max-steps 95 --decay-steps 20",
            "begin after step 75, but 90 are done; give --decay-steps 5 or --max-steps 110",
        ),
        ("--max-steps 200 --warmup-steps 20", r"\(warmup_steps: 10 -> 20\); give the old values, or a new --out"),
        ("--max-steps 200 --schedule cosine --decay-steps 5", "--decay-steps 5: belongs to --schedule wsd, not cosine"),
        ("--max-steps 200 --decay-steps 195", r"0\.\.190: .* 10 steps of warm-up \(the run's\)"),
    ],
)
def test_refused_extensions(finished: RunFolder, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        finished.extend(identity(finished.path, *words.split()))
    assert "\n" not in str(caught.value)
    assert [step_of(path) for path in checkpoints(finished.checkpoints)] == [100, 95, 90]
    assert not finished.ends.exists()


def test_an_older_extension_does_not_undo_a_newer_one(finished: RunFolder) -> None:
    """As of a job that waited in a queue meanwhile."""
    older = identity(finished.path, "--max-steps", 200)
    finished.extend(older)
    finished.extend(identity(finished.path, "--max-steps", 300))
    with pytest.raises(UserError, match="had this plan once and was extended since, to 300 steps"):
        finished.extend(older)


def test_without_the_steady_checkpoint_nothing_is_passed_off_as_steady(finished: RunFolder) -> None:
    shutil.rmtree(finished.checkpoints / "global_step90")
    with pytest.raises(
        UserError, match=r"came down after step 90, .* no whole checkpoint before; give --schedule linear"
    ):
        finished.extend(identity(finished.path, "--max-steps", 200))
    told = finished.extend(identity(finished.path, "--max-steps", 200, "--schedule", "linear"))
    assert told is not None and "goes on from step 100; the learning rate goes from" in told
    assert "decay_steps" not in read_json(finished.recipe)


def test_a_checkpoint_of_another_schedule_is_not_taken_for_steady(finished: RunFolder) -> None:
    """The run was linear up to step 100: from there on the peak is held, and before nothing was."""
    values = read_json(finished.recipe)
    finished.recipe.write_text(json.dumps({k: v for k, v in values.items() if k not in ("schedule", "decay_steps")}))
    late = ("--schedule", "wsd", "--max-steps", 200)
    with pytest.raises(UserError, match="begin after step 50, but 100 are done; give --decay-steps 100 or"):
        finished.extend(identity(finished.path, *late, "--decay-steps", 150))
    assert finished.extend(identity(finished.path, *late, "--decay-steps", 100))
    shutil.rmtree(finished.checkpoints / "global_step100")
    write_checkpoint(finished.path, 150)
    with pytest.raises(UserError, match="no whole checkpoint before"):
        finished.extend(identity(finished.path, "--max-steps", 300))


def test_the_run_has_its_own_codes_and_must_be_told_where_the_data_are(finished: RunFolder) -> None:
    values = read_json(finished.recipe) | {"plain": False, "codes": "elsewhere/codes.safetensors"}
    finished.recipe.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"^--codes elsewhere/codes.safetensors \(from .*recipe.json\): is not there from"
    ):
        parse_recipe(longer(finished.path, "--max-steps", 200))
    finished.codes.touch()
    assert parse_recipe(longer(finished.path, "--max-steps", 200)).codes == finished.codes
    finished.recipe.write_text(json.dumps(values | {"data": "moved"}))
    with pytest.raises(
        UserError, match=r"^--data moved \(from .*recipe.json\): is not there from here; give --data PATH"
    ):
        parse_recipe(longer(finished.path, "--max-steps", 200))
    assert parse_recipe(longer(finished.path, "--max-steps", 200, "--data", finished.path)).data == finished.path


def test_a_refused_start_leaves_the_run_as_it_was(bench: Bench) -> None:
    run = bench.folder / "refused"
    done = bench.run_all(1, [{"arguments": bench.arguments("refused", max_steps=2, eval_every=0)}])
    (run / "failure.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    command = [sys.executable, "-m", "ksub_ds.pretrain", *longer(run, "--max-steps", 1)]
    refused = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done[0] == [0] and refused.returncode == USER_ERROR
    assert refused.stderr.splitlines()[-1] == "error: --extend --max-steps 1: 2 steps are done; give more"
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_failure_before_the_run_goes_on_is_recorded_once(finished: RunFolder) -> None:
    finished.failure.write_text("{}")  # of an earlier start
    failed = Failure(0, "here", 0, "the data's disk is gone", FAILED, restart_may_help=True)
    for _ in range(2):  # by the rank that reports, and by rank 0
        finished.record_early_failure(failed)
    assert read_json(finished.failure)["reason"] == "the data's disk is gone"
    assert len(finished.log.read_text().splitlines()) == 1


def test_every_rank_ends_at_a_mistake_that_rank_0_sees(tmp_path: Path) -> None:
    """Rank 1, on another host, may not see the run folder; it must not wait for a rank that has gone."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "ksub_ds.pretrain", *longer(tmp_path / "none", "--max-steps", 5)]
    ranks = [
        subprocess.Popen(
            command, env=environment() | place | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [USER_ERROR, USER_ERROR], errors
    assert errors[0].splitlines()[-1].endswith("recipe.json is not there; leave --extend out to start a run")
    assert "error" not in errors[1]


def test_what_is_not_given_stays_as_the_run_has_it(finished: RunFolder) -> None:
    for compiled in (False, True):
        finished.recipe.write_text(json.dumps(read_json(finished.recipe) | {"compile": compiled}))
        assert parse_recipe(longer(finished.path, "--max-steps", 200)).compile is compiled
        assert parse_recipe(longer(finished.path, "--max-steps", 200, "--no-compile")).compile is False


def test_there_must_be_a_run_to_extend(tmp_path: Path) -> None:
    for words, message in (
        (["--extend", "--max-steps", "5"], "--extend: name with --out the run folder to go on in"),
        (longer(tmp_path, "--max-steps", 5), "recipe.json is not there; leave --extend out to start a run"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plans", [[], 5, [1], {}, [{"max_steps": 7}]])
def test_a_history_edited_by_hand_is_one_line(finished: RunFolder, plans: Any) -> None:
    finished.recipe.write_text(json.dumps(json.loads(finished.recipe.read_text()) | {"plans": plans}))
    with pytest.raises(UserError, match=r"recipe\.json: plans .*: is not the history of a run"):
        finished.extend(identity(finished.path, "--max-steps", "200"))

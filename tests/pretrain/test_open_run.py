"""Opening a run folder: each part on its own, so that one damaged file does not hide the others."""

import json
from pathlib import Path

import pytest

from ksub_ds.cluster.launch import last_checkpoint
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.pretrain.checkpoint import FILES, FORMAT, MANIFEST, checkpoint_name, step_of
from ksub_ds.pretrain.open_run import is_run, open_run


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(json.dumps({"step": step, "codes_sha256": "aa"}))
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in FILES}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 9 and 10, whose recipe is damaged."""
    (tmp_path / "recipe.json").write_text("{")
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def test_checkpoints_are_ordered_by_step(run: Path) -> None:
    opened = open_run(run)
    assert opened.checkpoint_steps() == [10, 9]
    newest = opened.checkpoint()
    assert (newest.step, newest.path.name, newest.state.codes_sha256) == (10, "global_step10", "aa")
    assert opened.checkpoint(9).weights == run / "checkpoints" / "global_step9" / "model.safetensors"
    assert step_of(newest.path) == 10
    (newest.path / "trainer.json").write_text("{}")
    assert opened.checkpoint().step == 9
    with pytest.raises(UserError, match=r"--step 10: .*trainer\.json has 2 bytes"):
        opened.checkpoint(10)
    with pytest.raises(UserError, match=r"--step 7: .*there are checkpoints of step 10, 9"):
        opened.checkpoint(7)


def test_a_restart_names_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    """Nothing is checked there but that the manifest was written."""
    (run / "checkpoints" / "global_step11").mkdir()
    (run / "checkpoints" / ".global_step12.ab.partial").mkdir()
    (run / "checkpoints" / "global_step12.old").mkdir()
    assert last_checkpoint(run) == f"last checkpoint: {run / 'checkpoints' / 'global_step10'}"
    assert last_checkpoint(tmp_path / "none") == "there is no checkpoint yet"


def test_what_a_kill_cut_short_is_left_out(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    opened = open_run(run)
    assert opened.metrics == [{"step": 1, "loss": 2.5}] and opened.evaluations == []
    with pytest.raises(UserError, match=r"recipe\.json: is not valid JSON"):
        _ = opened.recipe


def test_another_folder_is_not_a_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with pytest.raises(UserError, match=r"no recipe\.json there; give the --out folder of `ksub pretrain`"):
        open_run(tmp_path)


def test_a_checkpoint_is_named_by_its_run(run: Path) -> None:
    with pytest.raises(UserError, match=r"global_step9: no recipe\.json there; .* and for a checkpoint --step: "):
        open_run(run / "checkpoints" / "global_step9")
    with pytest.raises(UserError, match="nowhere: is not there; give the --out folder"):
        open_run(run / "nowhere")

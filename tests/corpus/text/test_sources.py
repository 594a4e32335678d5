"""Which files are taken: each text once, whatever lies beside it; what is left out is counted; --strict refuses it."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import LanguageText, find_text

get_logger()  # caplog sees the lines of loggers that exist when a test begins


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
}


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def write(path: Path, content: bytes | None = None) -> Path:
    """A file with a document that names it, unless a content is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = COMPRESS.get(path.suffix.lower(), bytes)
    path.write_bytes(compress(line(f"the text of {os.fsencode(path.name)!r}") if content is None else content))
    return path


def names(text: LanguageText) -> list[str]:
    return [source.name for source in text.sources]


def found(folder: Path, **options: Any) -> dict[str, list[str]]:
    return {language: names(text) for language, text in find_text(folder, **options).items()}


def test_hidden_names_are_left_out_at_every_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".en.jsonl", "._en.jsonl", ".ipynb_checkpoints/en.jsonl", "en.jsonl", "en/a.jsonl", "en/x/b.txt"):
        write(tmp_path / name, line(name))
    for name in ("en/._a.jsonl", "en/.ipynb_checkpoints/a.jsonl", "en/x/.b.txt", "en/x/__MACOSX/b.txt"):
        write(tmp_path / name)
    text = find_text(tmp_path)["en"]
    assert names(text) == ["en/a.jsonl", "en/x/b.txt", "en.jsonl"]
    assert text.skipped.counts == {"hidden": 4}
    assert text.skipped.examples["hidden"] == "en/._a.jsonl"
    assert "hidden names left out: 3 (._en.jsonl...)" in caplog.text


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_file_beside_its_compressed_form_counts_once(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "en.jsonl", line("one"))
    write(tmp_path / f"en.JSONL{suffix.upper()}", line("one"))
    write(tmp_path / f"en/x.txt{suffix}", b"two")
    write(tmp_path / f"en/x.txt{'.gz' if suffix == '.bz2' else '.bz2'}", b"two")
    write(tmp_path / f"en/y/x.txt{suffix}", b"two, elsewhere")
    text = find_text(tmp_path)["en"]
    assert len(text.sources) == 3
    assert text.skipped.counts == {"compressed_copy": 2}
    assert "holds what" in text.skipped.examples["compressed_copy"]


def test_a_file_that_differs_from_its_compressed_form_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "en/x.jsonl", line("one") * 2)
    write(tmp_path / "en/x.jsonl.xz", line("one"))
    with pytest.raises(UserError, match=r"en/x\.jsonl\.xz: beside x\.jsonl, .* contents differ; remove or rename"):
        find_text(tmp_path)
    (tmp_path / "en/x.jsonl.xz").write_bytes(lzma.compress(line("one") * 2)[:-20])
    with pytest.raises(UserError, match=r"x\.jsonl\.xz is damaged"):
        find_text(tmp_path)


def test_two_bombs_are_not_compared_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksub_ds.common.compression.INFLATION_FREE", 1_000_000)
    write(tmp_path / "en.txt.gz", bytes(30_000_000) + b"a")
    write(tmp_path / "en.txt.xz", bytes(30_000_000) + b"b")
    assert found(tmp_path) == {"en": ["en.txt.gz"]}


def test_a_copied_file_counts_once(tmp_path: Path) -> None:
    for name in ("en/a (1).jsonl", "en/a.jsonl", "en/copy/a.jsonl", "de.jsonl"):
        write(tmp_path / name, line("the same"))
    write(tmp_path / "en/b.jsonl", line("the sane"))  # of the same size
    for name in ("en/c.txt", "en/d.txt"):
        write(tmp_path / name, b"")  # empty files have nothing that could count twice
    text = find_text(tmp_path)
    assert names(text["en"]) == ["en/a (1).jsonl", "en/b.jsonl", "en/c.txt", "en/d.txt"]
    assert text["en"].skipped.counts == {"copy": 2} and names(text["de"]) == ["de.jsonl"]
    assert text["en"].skipped.examples["copy"] == "en/a.jsonl is a copy of en/a (1).jsonl"


def test_one_name_in_two_forms_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "en.jsonl")
    write(tmp_path / "en.txt.gz", b"a document")
    assert found(tmp_path) == {"en": ["en.jsonl", "en.txt.gz"]}
    assert "warning: en.jsonl and en.txt.gz: files of one name in different forms are all read" in caplog.text


HELD_OUT = {
    "en.test.jsonl": "test",
    "en_dev.jsonl": "validation",
    "en-valid/x.jsonl": "validation",
    "en/test-00000-of-00001.txt": "test",
    "en/test2020.txt": "test",
    "en/c4-validation.tfrecord-00000-of-00008.json.gz": "validation",
    "en/news/Dev/a.txt": "validation",
    "en/train/test.txt": "test",
}


def test_held_out_text_is_not_trained_on_silently(tmp_path: Path) -> None:
    training = ["en.train.jsonl", "en/a.txt", "en/latest.txt", "en/training-00000-of-00001.txt", "en/developers.txt"]
    for name in [*HELD_OUT, *training]:
        write(tmp_path / name, line(name))
    write(tmp_path / "en/test/train.txt", b"the innermost word counts")
    text = find_text(tmp_path, splits=())["en"]
    assert sorted(names(text)) == sorted([*training, "en/test/train.txt"])
    assert text.skipped.counts == {"held_out_split": len(HELD_OUT)}
    assert "--splits train validation takes it too" in text.skipped.examples["held_out_split"]
    only = find_text(tmp_path, splits=("test",))["en"]
    assert sorted(names(only)) == sorted(name for name, split in HELD_OUT.items() if split == "test")
    assert only.skipped.counts == {"other_split": len(HELD_OUT) + len(training) + 1 - len(only.sources)}
    assert len(find_text(tmp_path)["en"].sources) == len(HELD_OUT) + len(training) + 1


def test_a_folder_of_splits_is_no_folder_of_languages(tmp_path: Path) -> None:
    """dev and val are codes of languages, too, which nobody means."""
    for name in ("train/a.jsonl", "dev/a.jsonl", "val.jsonl"):
        write(tmp_path / name)
    with pytest.raises(UserError, match="holds no language") as caught:
        find_text(tmp_path)
    assert "dev: its name is that of a split; put it in <lang>/, or give --languages dev" in str(caught.value)
    assert found(tmp_path, languages=("dev",)) == {"dev": ["dev/a.jsonl"]}


def test_a_saved_data_set_is_what_its_state_names(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    saved = {"en": rows, "de": datasets.DatasetDict({"train": rows, "test": rows.select([0])})}
    for language, data in saved.items():
        data.save_to_disk(tmp_path / language)
    datasets.load_from_disk(tmp_path / "en").map(lambda row: {"text": row["text"].upper()})
    datasets.load_from_disk(tmp_path / "en").filter(lambda row: row["text"] == "two")
    caches = len(list((tmp_path / "en").glob("cache-*.arrow")))
    write(tmp_path / "en/more.jsonl")
    text = find_text(tmp_path, splits=())
    assert names(text["en"]) == ["en/data-00000-of-00001.arrow"]
    assert text["en"].skipped.counts == {"cache": caches, "not_data": 2, "not_in_state_json": 1} and caches >= 2
    assert names(text["de"]) == ["de/train/data-00000-of-00001.arrow"]
    assert text["de"].skipped.counts["held_out_split"] == 1
    with pytest.raises(UserError, match="give it as --datasets"):
        find_text(tmp_path / "en")
    (tmp_path / "en/data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00000-of-00001\.arrow, which is not there"):
        find_text(tmp_path)


def test_links_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Into the Hugging Face cache, to a language's folder elsewhere, to files beside; and each file once."""
    blob = write(tmp_path / "hub/blobs/1234", line("one"))
    data = tmp_path / "hub/snapshots/abc/data"
    (data / "en").mkdir(parents=True)
    (data / "en/train-0.jsonl").symlink_to(Path("../../../../blobs") / blob.name)
    write(tmp_path / "store/german/a.jsonl")
    write(tmp_path / "store/german/deep/b.jsonl")
    (tmp_path / "store/german/again").symlink_to("deep")
    (data / "de").symlink_to(tmp_path / "store/german")
    (data / "el.jsonl").symlink_to(tmp_path / "store/german/a.jsonl")
    assert found(data) == {"de": ["de/a.jsonl", "de/deep/b.jsonl"], "el": ["el.jsonl"], "en": ["en/train-0.jsonl"]}
    assert find_text(data)["de"].skipped.counts == {"same_folder": 1}
    assert "read through links out of the folder: 1 (first: en/train-0.jsonl is" in caplog.text
    assert "warning: el.jsonl and de/a.jsonl are one file, read as two languages" in caplog.text


@pytest.mark.parametrize(
    ("name", "target", "fault"),
    [
        ("en/b.jsonl", "nowhere.jsonl", "is a link to nowhere.jsonl, which is not there; mount or copy it"),
        ("fr", "nowhere", "is a link to nowhere, which is not there"),
        ("fr.jsonl", "fr.jsonl", "is a link to fr.jsonl, which is not there"),
        ("en/x/loop", "..", "a folder that it lies in"),
        ("en/all", "..", "a folder that it lies in"),
        ("fr", ".", "a folder that it lies in"),
        ("en/m.txt", "/proc/meminfo", "files of the kernel"),
    ],
)
def test_links_that_lead_nowhere_are_refused(tmp_path: Path, name: str, target: str, fault: str) -> None:
    write(tmp_path / "en/a.jsonl")
    (tmp_path / "en/x").mkdir()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError, match=fault):
        find_text(tmp_path)


def test_links_that_were_copied_as_text_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "store/en/a.jsonl")
    write(tmp_path / "in/de/a.txt", b"and/or")
    write(tmp_path / "in/de/b.txt", b"x/" + b"y" * 900)
    assert found(tmp_path / "in") == {"de": ["de/a.txt", "de/b.txt"]}
    for name, target in (("en", "../store/en"), ("de/c.jsonl", "../../store/en/a.jsonl\n")):
        path = write(tmp_path / "in" / name, target.encode())
        with pytest.raises(UserError, match=f"{name}: is a link to {target.strip()} that was copied as text"):
            find_text(tmp_path / "in")
        path.unlink()


def test_languages_are_read_in_any_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("en_US.txt", "rus_Cyrl/0.jsonl", "zh_cn.jsonl", "zh-CN/0.jsonl", "pt-BR.jsonl", "deu/0.jsonl"):
        write(tmp_path / name, line(name))
    assert found(tmp_path) == {
        "deu": ["deu/0.jsonl"],
        "en-US": ["en_US.txt"],
        "pt-BR": ["pt-BR.jsonl"],
        "ru": ["rus_Cyrl/0.jsonl"],
        "zh-CN": ["zh-CN/0.jsonl", "zh_cn.jsonl"],
    }
    assert "rus_Cyrl: read as language ru" in caplog.text
    assert list(found(tmp_path, languages=("de", "rus", "ZH_CN"))) == ["deu", "ru", "zh-CN"]
    with pytest.raises(
        UserError, match=r"--languages zh: .* holds no such language, only deu, en-US, pt-BR, ru, zh-CN"
    ):
        find_text(tmp_path, ("zh",))
    write(tmp_path / "de.jsonl")
    with pytest.raises(UserError, match=r"de.jsonl and deu are one language in two spellings; rename one"):
        find_text(tmp_path)
    assert list(found(tmp_path, languages=("ru",))) == ["ru"]


def test_names_that_are_not_utf8_are_read(tmp_path: Path, tiny_tokenizer: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/fr"))
    write(folder / os.fsdecode(b"caf\xe9.jsonl"), line("a small river"))
    write(folder / os.fsdecode(b"\xe9\n.csv"), b"x")
    manifest = shard_text(ShardText(folder.parent, tiny_tokenizer, tmp_path / "out", 64, 0.0, 1))
    assert manifest["languages"]["fr"]["train"]["documents"] == 1
    text = find_text(folder.parent)["fr"]
    assert names(text) == ["fr/caf\\xe9.jsonl"]
    assert text.skipped.lines() == ["other_suffix 1 (first: fr/\\xe9\\n.csv: suffix .csv)"]


@pytest.fixture
def shard(tmp_path: Path, tiny_tokenizer: Path) -> Callable[..., dict[str, Any]]:
    """Shard tmp_path/in to tmp_path/out."""

    def run(**options: Any) -> dict[str, Any]:
        return shard_text(ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "out", 64, 0.0, 1, **options))

    return run


def test_the_manifest_is_what_is_asked_for(
    tmp_path: Path, shard: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for language in ("de", "en", "fr"):
        write(tmp_path / f"in/{language}.jsonl", line("a river"))
    assert set(shard()["languages"]) == {"de", "en", "fr"}
    assert set(shard(languages=("en", "fr"))["languages"]) == {"en", "fr"}
    (tmp_path / "in/fr.jsonl").unlink()
    caplog.clear()
    assert set(shard(languages=("EN",))["languages"]) == {"en"}
    assert "out holds de, fr from an earlier run" in caplog.messages[-3] + caplog.messages[-2]
    assert f"rm -r {tmp_path}/out/de {tmp_path}/out/fr" in caplog.text
    assert ShardDataset.open(tmp_path / "out").languages == ["en"]
    assert set(shard()["languages"]) == {"de", "en"}  # de was still there, and whole


def test_what_is_left_out_is_told_last_and_refused_by_strict(
    tmp_path: Path, shard: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in/en/a.jsonl", line("a river"))
    write(tmp_path / "in/en/README.md", b"nobody misses it")
    shard(strict=True)
    for name in ("en/b.csv", "en/dev.jsonl", "english.txt"):
        write(tmp_path / "in" / name, line(name))
    caplog.clear()
    shard()
    last = caplog.messages[-4:]
    assert last[0].startswith("warning: left out: no_language 1 (first: english.txt: its name is not")
    assert "left out of en: held_out_split 1" in last[1] and "other_suffix 1 (first: en/b.csv: suffix .csv)" in last[1]
    with pytest.raises(
        UserError, match=r"--strict: left out: no_language 1 .* and 1 more lines above; nothing was read"
    ):
        shard(strict=True)
    assert ShardDataset.open(tmp_path / "out").languages == ["en"]  # the manifest of the run before
    for name in ("en/b.csv", "english.txt"):
        (tmp_path / "in" / name).unlink()
    shard(strict=True, splits=("train",))  # asked for, so nothing is missing


def test_strict_refuses_what_cannot_be_read(tmp_path: Path, shard: Callable[..., dict[str, Any]]) -> None:
    write(tmp_path / "in/de.jsonl", b"")
    write(tmp_path / "in/en/a.jsonl", line("a river"))
    whole = gzip.compress(line("a stone") * 500)
    (tmp_path / "in/en/b.jsonl.gz").write_bytes(whole[:-30])
    shard()
    for _ in range(2):  # the second time from part.json
        with pytest.raises(UserError, match=r"--strict: not read to the end in en: damaged_gzip 1.*; the shards stay"):
            shard(strict=True)
        assert not (tmp_path / "out/manifest.json").exists() and (tmp_path / "out/en/part.json").exists()
    (tmp_path / "in/en/b.jsonl.gz").write_bytes(whole)
    with pytest.raises(UserError, match=r"--strict: no readable document in de"):
        shard(strict=True)
    (tmp_path / "in/de.jsonl").unlink()
    assert set(shard(strict=True)["languages"]) == {"en"}


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": lambda texts: b"".join(map(line, texts)),
    ".json": lambda texts: b"\n".join(map(line, texts)),
    ".txt": lambda texts: "\n\n".join(texts).encode(),
}
NOISE = ["hidden", "hidden folder", "copy", "pair", "held out", "suffix", "cache", "link", "linked folder", "bytes"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from(sorted(FORMS)),
            st.sampled_from(sorted(COMPRESS)),
            st.sampled_from(["", "en/", "en/a/", "en/a b/c/"]),
            st.booleans(),
            st.sets(st.sampled_from(NOISE), max_size=4),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_mixture_gives_each_document_once(files: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, store = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("store")
    expected: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for number, (count, form, compression, place, upper, noise) in enumerate(files):
        texts = [f"document {number} {index} of the corpus" for index in range(count)]
        expected.update(texts)
        content = FORMS[form](texts)
        suffixes = (form + compression).upper() if upper else form + compression
        stem = f"en.{number}" if not place else f"part {number}"
        if "bytes" in noise:
            stem += os.fsdecode(b"\xe9\xff")
        path = write(folder / place / (stem + suffixes), content)
        beside = path.parent if place else folder / "en"
        if "link" in noise:
            target = store / f"{number}"
            path.rename(target)
            path.symlink_to(target)
        if "linked folder" in noise:
            write(folder / "en/real/in it.jsonl", line("once"))
            expected["once"] = 1
            (beside / f"again {number}").parent.mkdir(parents=True, exist_ok=True)
            (beside / f"again {number}").symlink_to(folder / "en/real")
            counted["same_folder"] += 1
        if "hidden" in noise:
            write(beside / f".{stem}{suffixes}", content)
            counted["hidden"] += 1
        if "hidden folder" in noise:
            write(beside / f".hidden {number}" / f"x{suffixes}", content)
            counted["hidden"] += 1
        if "copy" in noise:
            (beside / f"copy {number}{suffixes}").parent.mkdir(parents=True, exist_ok=True)
            (beside / f"copy {number}{suffixes}").write_bytes(path.read_bytes())
            counted["copy"] += 1
        if "pair" in noise:
            other = ".xz" if compression != ".xz" else ".gz"
            write(path.with_name(stem + form + other), content)
            counted["compressed_copy"] += 1
        if "held out" in noise:
            write(beside / f"test {number}{suffixes}", FORMS[form]([f"held out {number}"]))
            counted["held_out_split"] += 1
        if "suffix" in noise:
            write(beside / f"{stem}.csv", content)
            counted["other_suffix"] += 1
        if "cache" in noise:
            write(beside / f"cache-{number:016x}.arrow", content)
            counted["cache"] += 1
    text = find_text(folder, splits=())["en"]
    assert Counter(document.strip() for document in DocumentReader(text.sources, Skipped())) == expected
    assert text.skipped.counts == counted
    assert text.fingerprint() == find_text(folder, splits=(), others=Skipped())["en"].fingerprint()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.jsonl", b'{"content": "a river"}\n'),
        ("b.json", b'["a river", "two"]'),
        ("b.jsonl", '{"text": "a river"}\n'.encode("utf-16-le")),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        ("b.txt", b"\n <!DOCTYPE html>\n<html><body>not found</body></html>\n"),
        ("b.jsonl", b"PK\x03\x04" + bytes(100)),
        # No time in it: the name of a test is the same in every process.
        ("b.txt.gz", gzip.compress(gzip.compress(b"a river", mtime=0), mtime=0)),
        ("b.jsonl", b""),
        ("b.json", b'[{"text": "a river"},\n{"text": "tw'),
    ],
)
def test_a_file_that_gives_nothing_is_lost_whatever_the_reason(
    tmp_path: Path, shard: Callable[..., dict[str, Any]], name: str, content: bytes
) -> None:
    write(tmp_path / "in/en/a.jsonl")
    write(tmp_path / "in/en" / name, content)
    with pytest.raises(UserError, match=rf"--strict: not read to the end in en: .*\(first: en/{name}"):
        shard(strict=True)


def test_numbers_of_shards_are_no_languages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("en-00000-of-00002.jsonl", "en-00001-of-00002.jsonl", "de-train-00000-of-00003.jsonl", "old/x.jsonl"):
        write(tmp_path / name)
    assert set(found(tmp_path)) == {"de", "en", "old"}
    assert "read as languages, though not common codes: old" in caplog.text


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (b"\n" + b"a river and more\n" * 4000, "its 4,001 lines have no blank line"),
        (b"a river and more\n" * 4000 + b"\n", "its 4,001 lines have no blank line"),
        (b"a river and more\r" * 4000, "its lines end in CR alone"),
    ],
)
def test_one_large_document_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: bytes, hint: str) -> None:
    write(tmp_path / "en.txt", lines)
    assert len(list(DocumentReader(find_text(tmp_path)["en"].sources, Skipped()))) == 1
    assert hint in caplog.text

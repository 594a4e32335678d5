"""The documents hold: commands and snippets run as written, links lead somewhere, the index leads to every page."""

import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
RUN = ("first_hour.md", "pretrain.md", "codes.md", "analyse.md")  # each finds what the ones before it made


def fenced(path: Path, language: str) -> list[str]:
    """The blocks of a page that are marked as being in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> list[str]:
    """The lines of a page's bash blocks."""
    lines = "".join(fenced(DOCS / page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as after `make demo`, only smaller: text, tokenizer and shards; and the same text as text/."""
    folder = tmp_path_factory.mktemp("documents")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*command):
        subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, check=True, timeout=100)

    demo = ROOT / "experiments" / "demo"
    run(demo / "corpus.py", "--out", "corpus", "--bytes-per-language", "60000")
    for language in ("en", "fr", "sw"):
        for target in (folder / "demo" / "text", folder / "text"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "corpus" / f"{language}.jsonl.gz", target)
    run(demo / "tokenizer.py", "--input", "text", "--out", "sentencepiece.bpe.model")
    (folder / "demo" / "tokenizer").mkdir()
    shutil.copy(folder / "sentencepiece.bpe.model", folder / "demo" / "tokenizer")
    return folder


@pytest.mark.timeout(300)
def test_commands_of_the_documents_run(workplace):
    """All pages in one process, in order, in one folder."""
    shards = ["--tokenizer", "sentencepiece.bpe.model", "--sequence-length", "128", "--validation-fraction", "0.02"]
    lines = [" ".join(["python preprocessing/shard_text.py --input text", *shards, "--out", "demo/shards"])]
    for page in RUN:
        found = command_lines(page)
        assert found, f"{page} has no bash block"
        lines += found
    listed = workplace / "lines.json"
    listed.write_text(json.dumps(lines), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tests" / "docs" / "run_commands.py"), str(listed)]
    with open(workplace / "output.txt", "w") as output:  # a pipe would wait for worker processes that linger
        done = subprocess.run(
            command, cwd=workplace, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=280, check=False
        )
    assert done.returncode == 0, (workplace / "output.txt").read_text()[-4000:]
    made = ("hour/report.html", "hour/analysis/explore.html", "model/config.json", "both/analysis.json", "report.html")
    for name in made:
        assert (workplace / name).is_file(), name


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", DOCS / "codes.md", DOCS / "causal.md", DOCS / "transformers.md"],
    ids=lambda path: path.name,
)
def test_python_snippets_run(path, tmp_path, monkeypatch):
    """As written, one after the other in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = fenced(path, "python")
    assert blocks, f"{path.name} has no python block"
    namespace = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), namespace)


def test_the_readme_replaces_two_lines_and_changes_no_loss():
    """Its first snippet, small, against the same with the two lines that it shows as comments."""
    import torch

    ours = fenced(ROOT / "README.md", "python")[0].replace("250_002", "500").replace("512", "64")
    swapped, count = re.subn(r"^( +)# ((?:self\.|return ).*)\n.*\n", r"\1\2\n", ours, flags=re.MULTILINE)
    assert count == 2 and "factorized_cross_entropy(" not in swapped
    spaces = []
    for source in (ours, "import torch.nn.functional as F\n" + swapped):
        spaces.append({})
        exec(source, spaces[-1])
    new, old = (space["model"].eval() for space in spaces)
    weights = {name: value for name, value in new.state_dict().items() if not name.startswith("embedding.")}
    old.load_state_dict(weights | {"embedding.weight": new.embedding.dense_weight()})
    ids = spaces[0]["ids"]
    torch.testing.assert_close(new(ids, ids), old(ids, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (DOCS / link).exists(), f"{page} links to {link}"
    folders = "ksub_ds|preprocessing|launch|experiments|benchmarks|ds_configs|tests"
    for name in set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", text)):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_every_page_can_be_found():
    """From the index, or from the README."""
    places = (DOCS / "index.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((?:docs/)?([\w.]+\.md)\)", places))
    assert set(PAGES) - linked == {"index.md"} - linked


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Also in the blocks that are not run: every `ksub NAME` is a command."""
    from ksub_ds.cli import COMMANDS

    text = (DOCS / page).read_text(encoding="utf-8")
    for words in re.findall(r"(?:^|`)(?:\$ )? *(?:[\w/.-]+ )*?ksub ((?:[a-z]+ ?){1,2})", text, re.MULTILINE):
        known = {name.split()[0] for name in COMMANDS}
        assert words.split()[0] in known, f"{page}: ksub {words}"


def test_api_pages_come_from_the_docstrings(tmp_path):
    """Of two modules: the whole takes a quarter of a minute."""
    pytest.importorskip("pdoc", reason="pdoc is not installed (pip install -e '.[docs]')")
    build_api = runpy.run_path(str(DOCS / "build_api.py"))
    assert {"ksub_ds", "ksub_ds.codes.table", "ksub_ds.cli"} <= set(build_api["documented_modules"]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a public name that does not resolve is a warning of pdoc's
        build_api["build"](tmp_path / "api", ["ksub_ds", "ksub_ds.codes.table"])
    page = html.unescape((tmp_path / "api" / "ksub_ds.html").read_text(encoding="utf-8"))
    assert "Drop-in for" in page and "factorized_cross_entropy" in page
    assert "no two tokens share a whole code" in (tmp_path / "api" / "ksub_ds" / "codes" / "table.html").read_text()

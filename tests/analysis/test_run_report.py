"""The report of a run: its numbers are those of the files, it is one file, and a browser shows it."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ksub_ds.analysis import run_report
from ksub_ds.analysis.run_report import write_report
from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.recipe import Recipe, to_json

HOSTILE = "<script>alert(1)</script>"
NAME = '"><img src=http:x onerror=alert(2)>&'
STEPS = 1000
LANGUAGES = ("en", "el", HOSTILE)


def loss_at(step):
    return 4 + 4 * math.exp(-step / 200) + 0.1 * math.sin(step)


def make_run(folder: Path, last_step: int = STEPS) -> Path:
    """A run folder as `ksub pretrain` leaves it, with names that no one means well."""
    folder.mkdir()
    recipe = to_json(Recipe(preset="tiny", data=Path(HOSTILE), out=folder, codes=Path("c"), max_steps=STEPS))
    (folder / "recipe.json").write_text(json.dumps(recipe | {"codes_sha256": "ab" * 32, "sequence_length": 64}))
    table = positional_codes(3000, 3)
    quality = {"rank_correlation": 0.07241321834724553, "level_sizes": [HOSTILE], "inertia_over_free": [1.25, 1.5]}
    CodeTable(table.codes, table.table_sizes, {"algorithm": NAME, "quality": json.dumps(quality)}).save(
        folder / "codes.safetensors"
    )
    with open(folder / "metrics.jsonl", "w") as stream:
        for step in range(1, last_step + 1):
            line = {"step": step, "loss": loss_at(step), "lr": 1e-3 * step / STEPS, "grad_norm": 1 / step}
            line |= {"tokens": 1000 * step, "tokens_per_second": 100.5 + step, "step_seconds": 0.5}
            line |= {"model_tflops": 100.25 + step, "mfu": step / 7777, "peak_memory_gb": 40 + step / 3000}
            line |= {"data_wait_seconds": 0.001, **({"masked_accuracy": step / 5000} if step % 10 == 0 else {})}
            stream.write(json.dumps(line) + "\n")
    with open(folder / "evaluation.jsonl", "w") as stream:
        for step in range(0, last_step + 1, 250):
            rows = {
                name: {"loss": loss_at(step) + 0.123 * index, "masked_accuracy": step / 4321, "count": 100 + index}
                for index, name in enumerate(LANGUAGES)
            }
            line = {"step": step, "loss": loss_at(step) + 0.2, "masked_accuracy": step / 4000, "languages": rows}
            stream.write(json.dumps(line) + "\n")
    (folder / "train.log").write_text(
        "2026-11-20 22:24:16,938 python 3.11.7, torch 2.13.0+cpu, deepspeed 0.19.8\n"
        f"2026-11-20 22:24:16,942 2 ranks ({HOSTILE} x 2) on cpu, fp32, ZeRO stage 1\n"
        f"2026-11-20 22:24:16,943 device: NVIDIA H200 {HOSTILE}, 140 GiB; attention by sdpa, encoder compiled\n"
        "2026-11-20 22:24:17,000 training: 1/6 steps\n"
    )
    (folder / "command.txt").write_text(f"2026-11-20 22:24:00 ksub pretrain --data {HOSTILE}\n")
    (folder / "checkpoints" / "global_step500").mkdir(parents=True)
    return folder


XNLI = {
    "task": "xnli",
    "setting": "cross-lingual",
    "test": {
        "en": {"accuracy": 0.5213572854291417, "correct": 2612, "count": 5010, "interval": [0.5077, 0.5351]},
        "fr": {"accuracy": 0.4001996007984032, "correct": 2005, "count": 5010, "interval": [0.3866, 0.4138]},
    },
    "average": 0.46077844311377245,
    "average_interval": [0.4467, 0.4748],
    "model": {"path": f"models/{HOSTILE}", "kind": "clustered", "fingerprint": "cd" * 32},
    "data": {"path": "xnli", "fingerprint": "ef" * 32, "missing": {"train": ["bg", "el"], "test": []}},
    "settings": {"epochs": 1, "batch_size": 32},
    "selection": "best epoch on mean validation",
    "seeds": {"0": {"average": 0.46123456789}, HOSTILE: {"average": 0.46032231833}},
}
GLUE = {
    "task": "glue",
    "setting": "glue",
    "test": {
        "rte": {"best": {"accuracy": 0.5379061371841155, "score": 0.53}, "median": {"accuracy": 0.5270758122743683}},
        "mrpc": {
            "best": {"accuracy": 0.6838235294117647, "f1": 0.8122270742358079, "degenerate": f"every row {HOSTILE}"},
            "median": {"accuracy": 0.6838235294117647, "f1": 0.8122270742358079},
        },
    },
    "average": 0.53,
    "model": {"path": "small", "kind": "clustered"},
    "missing": {"qqp": "no train set"},
    "settings": {"epochs": 1},
}
ANALYSIS = {
    "models": [
        {
            "name": HOSTILE,
            "layers": [
                {
                    "layer": layer,
                    "states": 4998,
                    "s_inter": 0.09412345 + layer / 7,
                    "s_intra": None if layer else 0.9621,
                    "explained_variance_ratio": {"3": 0.41512345},
                }
                for layer in range(2)
            ],
        }
    ],
    "figures": ["similarity", "../../secret", f"layers-{NAME}"],
    "settings": {"languages": ["en", HOSTILE]},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a run with evaluations and an analysis, all of them hostile; a picture that is not in the folder."""
    root = tmp_path_factory.mktemp("reports")
    run = make_run(root / "run <b>&")
    for name, value in (("xnli", XNLI), ("xnli2", XNLI), ("glue", GLUE)):
        (root / name).mkdir()
        (root / name / "results.json").write_text(json.dumps(value))
    (root / "deep" / "analysis").mkdir(parents=True)
    (root / "deep" / "analysis" / "analysis.json").write_text(json.dumps(ANALYSIS))
    Image.new("RGB", (300, 200), "blue").save(root / "deep" / "analysis" / "similarity.png")
    Image.new("RGB", (30, 20), "red").save(root / "secret.png")
    scores = [root / "xnli", root / "xnli2", root / "glue" / "results.json"]
    write_report(run, root / "report.html", [*scores, root / "deep" / "analysis"])
    return root / "report.html"


class Page(HTMLParser):
    """Reads tables as rows of (text, values of <data>) cells, by the heading before them; and all tags."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.tags, self.data = {}, [], []
        self._heading, self._cell, self._value, self._in_heading = "", None, None, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("h2", "h3"):
            self._heading, self._in_heading = "", True
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self._cell = ["", []]
        elif tag == "data":
            self._value = [float(dict(attributes)["value"]), ""]

    def handle_endtag(self, tag):
        if tag in ("h2", "h3"):
            self._in_heading = False
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append(self._cell)
            self._cell = None
        elif tag == "data":
            self.data.append(self._value)
            if self._cell:
                self._cell[1].append(self._value[0])
            self._value = None

    def handle_data(self, text):
        if self._in_heading:
            self._heading += text
        if self._cell:
            self._cell[0] += text
        if self._value:
            self._value[1] += text

    def rows(self, heading):
        """Rows of the tables below a heading: words of the first cell -> values of the others."""
        return {row[0][0].strip(): [cell[1] for cell in row[1:]] for row in self.tables[heading]}


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


def test_every_number_shows_what_it_is(page):
    """The text of a number is its value, rounded."""
    assert len(page.data) > 40
    for value, shown in page.data:
        scale = 100 if shown.endswith("%") else 1
        digits = shown.removesuffix("%").strip().replace(",", "")
        decimals = len(digits.partition(".")[2])
        assert float(digits) == pytest.approx(value * scale, abs=0.500001 * 10**-decimals), (value, shown)


def test_languages_are_those_of_the_evaluations(page):
    rows = page.rows("Held-out loss by language")
    for index, name in enumerate(LANGUAGES):
        label = f"{name} {100 + index}"
        assert rows[label][0] == [loss_at(0) + 0.123 * index, loss_at(1000) + 0.123 * index]
        assert rows[label][1] == [0, 1000 / 4321]
    assert rows["all 303"] == [[loss_at(0) + 0.2, loss_at(1000) + 0.2], [0, 0.25]]


def test_parameters_are_those_of_the_model(page):
    import ksub_ds

    table = positional_codes(3000, 3)
    model = ksub_ds.KSubRobertaForMaskedLM(ksub_ds.KSubRobertaConfig.tiny(vocab_size=3000), table)
    total, tables = model.num_parameters(), sum(p.numel() for p in model.get_input_embeddings().parameters())
    rows = page.rows("Parameters (Table 1 of this run)")
    assert rows["parameters"] == [[total - tables + 3000 * 128], [total]]
    assert rows["embedding parameters"] == [[3000 * 128], [tables]]
    assert rows["saved"][1] == [1 - tables / (3000 * 128)]


def test_a_decoder_with_tables_of_its_own_is_told():
    counted = {"embedding": 90, "embedding_plain": 960, "total": 1000, "total_plain": 2740, "hidden_size": 32}
    table = positional_codes(30, 3)
    for ends, words in ((1, "Input embedding and decoder are one and the same"), (2, "has tables of its own")):
        run = SimpleNamespace(parameters=counted | {"ends": ends}, table=table)
        assert words in run_report.parameters(run)


def test_scores_are_those_of_the_results(page):
    rows = page.rows("XNLI, cross-lingual (Table 4)")
    assert rows["en"] == [*[[0.5213572854291417, 0.5077, 0.5351]] * 2, [72.9]]
    assert rows["fr"][0][0] == 0.4001996007984032
    assert rows["de"] == [[], [], [51.9]]
    assert rows["average"] == [*[[0.46077844311377245, 0.4467, 0.4748]] * 2, [48.9]]
    glue = page.rows("GLUE (Tables 2 and 3)")
    assert glue["rte accuracy"] == [[0.5379061371841155], [0.5270758122743683], [70.8]]
    assert glue["mrpc accuracy"][:2] == [[0.6838235294117647]] * 2 and glue["mrpc accuracy"][2]
    assert glue["f1"] == [[0.8122270742358079]] * 2 + [[]]
    assert glue["cola"][:2] == [[], []]
    values = [value for value, _ in page.data]
    assert values.count(0.46123456789) == values.count(0.46032231833) == 2  # of each seed, in both XNLI results


def test_analysis_is_that_of_its_numbers(page):
    found = [[cell[1] for cell in row[1:]] for row in page.tables["Analysis"][1:]]
    assert found == [
        [[0], [0.41512345], [0.09412345], [0.9621]],
        [[1], [0.41512345], [0.09412345 + 1 / 7], []],
    ]


def test_headline_and_speed(page, report):
    values = [value for value, _ in page.data]
    for expected in (600.25 + 0.5, 500.5 / 7777, 40 + 1 / 3):
        assert any(value == pytest.approx(expected, rel=1e-12) for value in values), expected
    for expected in (loss_at(1000), 600.5 + 0.5, 500, 1.0, 1_000_000, 0.07241321834724553):
        assert any(value == pytest.approx(expected, rel=1e-12) for value in values), expected
    shown = html.unescape(report.read_text(encoding="utf-8"))
    for words in (
        "finished",
        "torch 2.13.0+cpu",
        "2 ranks",
        "140 GiB; attention by sdpa, encoder compiled",
        "bf16 peak (MFU)",
        "ab" * 32,
        "500",
        "no train set",
        "bg, el",
        "22:24:16",
        "one answer",
    ):
        assert words in shown


def test_one_file_and_nothing_of_a_user_is_markup(page, report):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a", "b" * 9), tag
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "srcset", "style"):
            value = attributes.get(key, "")
            assert value.startswith("data:image/png") or ("url" not in value.lower() and "//" not in value)
    text = report.read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert HOSTILE not in text and NAME not in text
    assert not re.search(
        r"url\(|@import|https?://", re.sub(r"data:image/png[^\"]*", "", text).replace(html.escape(NAME), "")
    )
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 1, "only the picture that lies in the folder of the analysis"


def test_a_run_that_has_only_begun(tmp_path):
    """No step yet; then a few, the last line torn, a loss that is not a number, and a failure told."""
    run = make_run(tmp_path / "run", last_step=0)
    write_report(run, tmp_path / "empty.html")
    assert "No step has been recorded yet" in (tmp_path / "empty.html").read_text()
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 1, "loss": 8.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    (run / "evaluation.jsonl").unlink()
    (run / "failure.json").write_text(json.dumps({"reason": HOSTILE, "rank": 1}))
    write_report(run, tmp_path / "torn.html")
    text = (tmp_path / "torn.html").read_text()
    assert "not finished" in text and "No evaluation on held-out text" in text
    assert html.escape(HOSTILE) + "</b> (rank 1)" in text
    assert 8.5 in [value for value, _ in Page(tmp_path / "torn.html").data]


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", last_step=0)
    for _ in range(2):
        write_report(run, tmp_path / "page.html")
    before = (run / "recipe.json").read_bytes()
    with pytest.raises(UserError, match=r"--html .*recipe\.json: is a file that is no page of this command"):
        write_report(run, run / "recipe.json")
    assert (run / "recipe.json").read_bytes() == before


def test_an_extended_run_shows_its_plans(tmp_path):
    run = make_run(tmp_path / "run", last_step=20)
    recipe = json.loads((run / "recipe.json").read_text())
    plans = [{"from_step": 0, "max_steps": 700, "schedule": "linear"}]
    plans.append({"from_step": 640, "max_steps": STEPS, "schedule": HOSTILE, "decay_steps": 70})
    recipe |= {"schedule": "wsd", "decay_steps": 70, "plans": plans}
    (run / "recipe.json").write_text(json.dumps(recipe))
    write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<dt>schedule</dt><dd>wsd</dd>" in page and "<dt>decay_steps</dt><dd>70</dd>" in page
    rows = re.findall("<tr>(.*?)</tr>", page[page.index("Plans, one for each") :])[1:3]
    assert [re.findall("<td.*?>(.*?)</td>", row) for row in rows] == [
        ["0", "700", "linear", "–"],
        ["640", "1000", html.escape(HOSTILE), "70"],
    ]


def test_mistakes_name_the_folder(tmp_path):
    run = make_run(tmp_path / "run", last_step=1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "analysis.json").write_text("{}")
    for arguments, words in (
        ((tmp_path / "odd", tmp_path / "r.html"), "recipe.json"),
        ((run, tmp_path / "r.html", [tmp_path]), "neither results.json"),
        ((run, tmp_path / "r.html", [tmp_path / "odd"]), "not a results.json"),
        ((run, tmp_path / "r.html", [tmp_path / "empty"]), "is not one of `ksub analyze`"),
        ((run, tmp_path / "odd"), "--html"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            write_report(*arguments)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "damaged",
    [
        {"task": "classify", "test": {}, "scores": {}},  # no data
        XNLI | {"data": {"missing": ["fr"]}},
    ],
)
def test_damaged_scores_name_their_file(tmp_path, damaged):
    run = make_run(tmp_path / "run", last_step=1)
    (tmp_path / "results.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'results.json'}: is damaged (")):
        write_report(run, tmp_path / "r.html", [tmp_path / "results.json"])
    assert not (tmp_path / "r.html").exists()


def test_data_sets_of_ones_own_and_bits_per_byte_are_shown(tmp_path):
    run = make_run(tmp_path / "run", last_step=1)
    classify = {"task": "classify", "data": {"path": "x/reviews"}, "scores": {"test": {"accuracy": 0.8125}}}
    lm = {"task": "lm", "languages": {"en": {"bits_per_byte": 2.125}}, "average": 2.25, "data": {"path": "text"}}
    for name, value in (("own", classify), ("lm", lm)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(value))
    write_report(run, tmp_path / "page.html", [tmp_path / "own", tmp_path / "lm"])
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Other data sets</h3>" in page and "<h3>Bits per byte</h3>" in page and "reviews" in page
    assert {0.8125, 2.125, 2.25} <= {value for value, _ in Page(tmp_path / "page.html").data}


def console(done):
    """What a page said in the browser's console."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def requests(log):
    """What was asked for over the network, but for the browser's own calls home."""
    urls = set(re.findall(r'"url":"(https?://[^"]*)"', log.read_text(errors="replace")))
    return sorted(url for url in urls if ".google" not in url.split("/")[2])


def test_chromium_shows_it(chromium, report, tmp_path):
    """On a phone: no error, no request, not blank, and nothing to scroll sideways."""
    picture, log = tmp_path / "page.png", tmp_path / "net.json"
    done = chromium(report, f"--screenshot={picture}", f"--log-net-log={log}", width=390)
    assert console(done) == []
    assert requests(log) == []
    pixels = np.asarray(Image.open(picture).convert("L")).astype(float)
    assert pixels.shape[1] == 390
    assert all(part.std() > 5 for part in np.array_split(pixels, 4)), "a part of the page is empty"

    # the same page with a script and a picture from elsewhere: how wide is it, and would a request have been seen?
    measuring = tmp_path / "measure.html"
    script = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join()</script>"
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    picture = '<img src="http://127.0.0.1:9/seen" hidden>'
    measuring.write_text(without_policy + picture + script, encoding="utf-8")
    shown = chromium(measuring, "--dump-dom", f"--log-net-log={log}", width=390).stdout
    assert requests(log) == ["http://127.0.0.1:9/seen"]
    inner, scroll = map(int, re.search(r"<title>(\d+),(\d+)</title>", shown).groups())
    assert scroll <= inner


def test_chromium_prints_it(chromium, report, tmp_path):
    chromium(report, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) >= 2

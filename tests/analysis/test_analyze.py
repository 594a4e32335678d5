"""`ksub analyze`: the numbers are those of the states, the figures are there and say what they show."""

import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from ksub_ds.analysis import measure as measure_module
from ksub_ds.analysis.analyze import names_of
from ksub_ds.analysis.encoders import open_encoder
from ksub_ds.analysis.figures import STYLE, script_json
from ksub_ds.analysis.sample import sample_text
from ksub_ds.cli import main
from ksub_ds.codes.positional import positional_codes
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

from .devtools import browser

FIGURES = ("embeddings", "similarity", "layers-sub", "layers-plain", "tokens-sub")


def command(models, text, out, *more):
    arguments = ["analyze", *map(str, models), "--data", str(text), "--out", str(out), "--num-tokens", "600"]
    return [*arguments, "--languages", "en", "tr", "--points", "300", *more]


@pytest.fixture(scope="module")
def analysis(sub_model, plain_model, tiny_text, tmp_path_factory):
    """Both models in one analysis."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert main(command([sub_model, plain_model], tiny_text, out, "--tokens", "the", "a", "absent")) == 0
    return out


@pytest.fixture(scope="module")
def numbers(analysis):
    return json.loads((analysis / "analysis.json").read_text(encoding="utf-8"))


def test_what_was_measured_is_written_down(numbers, sub_model):
    sub, plain = numbers["models"]
    assert [sub["name"], plain["name"]] == ["sub", "plain"]
    assert sub["table_sizes"] == [7, 7, 7]
    assert plain["table_sizes"] == []
    assert [len(sub["layers"]), len(plain["layers"])] == [3, 4]
    assert sub["tokens_per_language"] == {"en": 300, "tr": 300}
    assert sub["layers"][1]["states"] == 600
    assert len(sub["weights_sha256"]) == 64
    assert sub["followed_ids"].keys() == {"the", "a"}
    assert numbers["settings"]["num_tokens"] == 600


def test_numbers_equal_those_of_the_states(brute_force, numbers, plain_model, tiny_text):
    """transformers alone, document by document, then all pairs."""
    from ksub_ds.corpus.text.reader import DocumentReader
    from ksub_ds.corpus.text.sources import find_text

    model, wrapped = AutoModel.from_pretrained(plain_model).eval(), AutoTokenizer.from_pretrained(plain_model)
    types, states = [], []
    for text in find_text(tiny_text, ("en", "tr")).values():
        left = 300
        for document in DocumentReader(text.sources, text.skipped):
            ids = wrapped(document, add_special_tokens=False)["input_ids"][: min(left, 62)]
            left -= len(ids)
            with torch.no_grad():
                row = torch.tensor([[wrapped.bos_token_id, *ids, wrapped.eos_token_id]])
                states.append(torch.stack(model(row, output_hidden_states=True).hidden_states)[:, 0, 1:-1])
            types += ids
            if not left:
                break
    types, states = np.array(types), torch.cat(states, dim=1).double().numpy()
    assert len(types) == 600
    for layer, own in zip(numbers["models"][1]["layers"], states, strict=True):
        inter, intra = brute_force(types, own)
        assert layer["s_inter"] == pytest.approx(inter, abs=1e-5)
        assert layer["s_intra"] == pytest.approx(intra, abs=1e-5)
        variances = np.linalg.svd(own - own.mean(axis=0), compute_uv=False) ** 2
        assert layer["explained_variance_ratio"]["3"] == pytest.approx(variances[:3].sum() / variances.sum(), abs=1e-5)
        mean = own[types == numbers["models"][1]["followed_ids"]["the"]].mean(axis=0)
        cosine = mean @ own.mean(axis=0) / np.linalg.norm(mean) / np.linalg.norm(own.mean(axis=0))
        assert layer["followed"]["the"]["cosine_to_centre"] == pytest.approx(cosine, abs=1e-4)


def test_embedding_ratio_is_that_of_the_whole_matrix(numbers, sub_model):
    matrix = AutoModel.from_pretrained(sub_model).get_input_embeddings().dense_weight().detach().double().numpy()
    variances = np.linalg.svd(matrix - matrix.mean(axis=0), compute_uv=False) ** 2
    found = numbers["models"][0]["embedding"]
    assert found["tokens"] == len(matrix)
    for p in ("1", "2", "3", "10"):
        expected = variances[: int(p)].sum() / variances.sum()
        assert found["explained_variance_ratio"][p] == pytest.approx(expected, abs=1e-6)


def test_passing_the_text_once_a_layer_gives_the_same(monkeypatch, numbers, sub_model, tiny_text):
    """What happens when the sums of all layers do not fit the memory."""
    monkeypatch.setattr(measure_module, "MEMORY_FOR_SUMS", 1)
    encoder = open_encoder(str(sub_model), "sub")
    sample = sample_text(tiny_text, ("en", "tr"), encoder.tokenizer, 600, 128)
    measured = measure_module.measure(encoder, sample, [], num_points=5)
    for layer, before in zip(measured.layers, numbers["models"][0]["layers"], strict=True):
        assert [layer.similarity.inter, layer.similarity.intra] == [before["s_inter"], before["s_intra"]]
        assert layer.cloud.axes.explained(3) == before["explained_variance_ratio"]["3"]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_there_and_not_blank(analysis, name):
    picture = np.asarray(Image.open(analysis / f"{name}.png").convert("L")).astype(float)
    assert min(picture.shape) > 400
    assert 0.005 < (picture < 200).mean() < 0.6, "nothing, or nothing but ink"
    for quarter in np.array_split(picture, 2, axis=0):
        assert quarter.std() > 5
    assert (analysis / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def svg_text(path):
    """All text of an SVG file, whose text is text and not curves."""
    return " ".join("".join(node.itertext()) for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}g"))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("embeddings", ["sub", "plain", "r₃ = ", "PC 1", "PC 2", "PC 3", "last code"]),
        (
            "similarity",
            ["sub", "plain", "mean cosine similarity", "layer (0: embedding)", "different tokens"],
        ),
        ("layers-sub", ["layer 0 (embedding)", "layer 2", "the", "mean state of the token", "600 tokens"]),
        ("layers-plain", ["layer 3", "PC 1"]),
        ("tokens-sub", ["the", "token", "mean of all states", "layer (0: embedding)"]),
    ],
)
def test_figures_carry_their_labels(analysis, name, labels):
    shown = svg_text(analysis / f"{name}.svg")
    for label in labels:
        assert label in shown, f"{name}.svg lacks {label!r}"


def test_explorer_is_one_file_and_holds_the_points(analysis):
    page = (analysis / "explore.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(|XMLHttp", page)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert [model["name"] for model in data] == ["sub", "plain"]
    assert len(data[0]["clouds"]) == 4  # the embedding matrix and layers 0 to 2
    for cloud in data[0]["clouds"]:
        assert len(cloud["xyz"]) == 3 * len(cloud["tokens"]) > 0
        assert max(cloud["tokens"]) < len(data[0]["words"]) == len(data[0]["codes"])


def test_nothing_in_a_word_ends_the_script():
    hostile = '</script><!--<script>alert("\u2028")&'
    text = script_json([hostile])
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == [hostile]


def test_names_of_models(tmp_path):
    assert names_of(["a/x", "b/x"]) == ["x-1", "x-2"]
    assert names_of(["m"], ["$x^2$ <b>/../"]) == ["x_2_b"]


def test_a_word_is_never_a_formula():
    """XLM-R has tokens with a dollar in them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        figure.text(0.5, 0.5, "$\\frac{$ of a user")
        figure.savefig(stream := io.StringIO(), format="svg")
    assert "$\\frac{$ of a user" in stream.getvalue()


@pytest.fixture
def broken_model(sub_model, tmp_path):
    """A model folder from whose weights a layer is missing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(sub_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "layer.1.attention.self.query" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_has_diverged_is_refused(capsys, sub_model, tiny_text, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(sub_model, tmp_path / "diverged")
    weights = load_file(folder / "model.safetensors")
    next(value for name, value in weights.items() if "layer.0.output.dense.bias" in name)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["analyze", str(folder), "--data", str(tiny_text), "--out", str(tmp_path / "out")]) == 2
    assert "are not finite" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_code_that_lies_with_a_model_is_never_run(capsys, tiny_text, tmp_path, monkeypatch):
    """Nor is anybody asked whether to."""
    folder = tmp_path / "model"
    folder.mkdir()
    classes = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foo", "auto_map": classes}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "asked").touch() or "y")
    assert main(["analyze", str(folder), "--data", str(tiny_text), "--out", str(tmp_path / "out")]) == 2
    assert "transformers cannot open this model" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists() and not (tmp_path / "ran").exists()


def test_mistakes_are_one_line(capsys, sub_model, plain_model, broken_model, tiny_text, tiny_tokenizer, tmp_path):
    def told(*arguments):
        assert main(["analyze", *map(str, arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    rest = ("--data", tiny_text, "--out", tmp_path / "out")
    assert "no such folder" in told("absent", *rest[:2], "--out", tmp_path / "out")
    assert "holds no such language" in told(sub_model, *rest, "--languages", "xx")
    assert "--data" in told(sub_model, "--data", tmp_path / "absent", "--out", tmp_path / "out")
    assert "neither a model" in told(tiny_text, *rest)
    assert "would be random" in told(broken_model, *rest)
    assert "not empty" in told(sub_model, "--data", tiny_text, "--out", tmp_path / "full")
    assert "--points 0" in told(sub_model, *rest, "--points", "0")
    assert "3 names for 1 models" in told(sub_model, *rest, "--names", "a", "b", "c")
    assert "is given twice" in told(sub_model, plain_model, *rest, "--names", "a", "a")
    assert "--tokenizer" in told(sub_model, *rest, "--tokenizer", plain_model)
    assert not (tmp_path / "out").exists()


def test_text_is_read_as_for_shards(tiny_tokenizer, tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer)
    (tmp_path / "en.jsonl").write_text('{"body": "a small river"}\n{"body": "a stone"}\n')
    with pytest.raises(UserError, match="only body; give --text-column body"):
        sample_text(tmp_path, (), tokenizer, 600, 128)
    (tmp_path / "tr.txt").write_text("kus\nve tas\n")
    sample = sample_text(tmp_path, (), tokenizer, 600, 128, TextLayout("body", line_documents=True))
    assert len(sample.rows) == 4


def test_a_plain_model_is_coloured_by_a_code_file(plain_model):
    encoder = open_encoder(str(plain_model), "plain")
    assert encoder.last_codes is None
    table = positional_codes(encoder.tokenizer.vocab_size, 2)
    coloured = open_encoder(str(plain_model), "plain", codes=table)
    assert coloured.last_codes.tolist() == table.codes[:, 1].tolist()
    assert coloured.table_sizes == ()
    with pytest.raises(UserError, match="--codes"):
        open_encoder(str(plain_model), "plain", codes=positional_codes(encoder.tokenizer.vocab_size + 1, 2))


def test_chromium_paints_the_clouds(analysis, chromium, tmp_path):
    """The script of explore.html runs, and its canvas has points of many colours."""
    picture = tmp_path / "explore.png"
    done = chromium(analysis / "explore.html", f"--screenshot={picture}")
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    colours = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50


CANVAS = "document.getElementById('cloud')"


@pytest.fixture(scope="module")
def page(chromium_program):
    """A browser that can be drawn upon."""
    with browser(chromium_program) as opened:
        yield opened


def middle(page):
    """Where the middle of the canvas is, in the window, and its width."""
    place = f"(b => [b.left + b.width / 2, b.top + b.height / 2, b.width])({CANVAS}.getBoundingClientRect())"
    return page.value(place)


def picture(page):
    return page.value(f"{CANVAS}.toDataURL()")


def test_dragging_turns_the_cloud(analysis, page):
    """With the mouse: it turns while a button is down, and as far as the mouse goes; not before, and not after."""
    page.open(analysis / "explore.html", width=1200)
    x, y, _ = middle(page)
    before = picture(page)
    page.mouse(("mouseMoved", x, y), ("mouseMoved", x + 90, y + 30))
    assert picture(page) == before
    page.mouse(("mousePressed", x, y), ("mouseMoved", x + 90, y + 30), buttons=1)
    turned = picture(page)
    assert turned != before
    assert page.value("[view.turn, view.tilt]") == pytest.approx([0.7 + 90 / 150, 0.45 + 30 / 150])
    page.mouse(("mouseMoved", x + 3000, y), buttons=1)  # off the canvas the mouse still holds it
    assert picture(page) != turned
    page.mouse(("mouseReleased", x + 3000, y))
    left_at = picture(page)
    page.mouse(("mouseMoved", x - 40, y - 40))
    assert picture(page) == left_at
    page.value("document.getElementById('reset').click()")
    assert picture(page) == before
    assert page.complaints == []


def test_wheel_keys_and_fields_change_the_picture(analysis, page):
    page.open(analysis / "explore.html", width=1200)
    x, y, _ = middle(page)
    seen = [picture(page)]
    page.mouse(("mouseWheel", x, y), deltaX=0, deltaY=-240)
    seen.append(picture(page))
    page.value(f"{CANVAS}.focus()")
    for name in ("ArrowLeft", "ArrowUp", "+"):
        page.key(name)
        seen.append(picture(page))
    for name, value in (("size", 5), ("layer", 2), ("model", 1)):
        event = "change" if name == "model" else "input"
        field = f"document.getElementById('{name}')"
        page.value(f"{field}.value = {value}; {field}.dispatchEvent(new Event('{event}'))")
        seen.append(picture(page))
    assert len(set(seen)) == len(seen)
    assert page.value("document.getElementById('told').textContent").startswith("plain, layer 1: r₃ = ")
    assert page.complaints == []


def test_a_dot_says_its_token(analysis, page):
    page.open(analysis / "explore.html", width=1200)
    box = middle(page)
    x, y, token = page.value(
        f"(b => {{ const p = shown.at(-1); return [b.left + p[0], b.top + p[1], model.words[cloud.tokens[p[3]]]] }})"
        f"({CANVAS}.getBoundingClientRect())"
    )
    page.mouse(("mouseMoved", box[0], box[1]), ("mouseMoved", x, y))
    assert page.value("document.getElementById('told').textContent").startswith(f"“{token}”, last code ")
    assert page.complaints == []


def test_a_finger_turns_it_on_a_phone(analysis, page):
    """At 390 pixels: nothing to scroll sideways, the whole canvas in view, and the page does not scroll instead."""
    page.open(analysis / "explore.html", width=390)
    x, y, width = middle(page)
    assert page.value("document.documentElement.scrollWidth") <= 390
    assert 300 < width <= 390
    before = picture(page)
    page.fingers([(x, y)], [(x + 20, y + 30)], [(x + 45, y + 60)])
    assert picture(page) != before
    assert page.value("[view.turn, view.tilt]") == pytest.approx([0.7 + 45 / 150, 0.45 + 60 / 150], abs=0.15)
    assert page.value("scrollY") == 0
    turned = page.value("[view.turn, view.tilt]")
    page.fingers([(x - 30, y), (x + 30, y)], [(x - 30, y), (x + 60, y)], [(x - 30, y), (x + 90, y)])
    assert page.value("view.zoom") == pytest.approx(2, rel=0.3)
    assert page.value("[view.turn, view.tilt]") == turned, "two fingers do not turn it"
    page.fingers([(x, y)], [(x + 30, y)])
    assert page.value("view.turn") > turned[0], "and then one does again"
    assert page.complaints == []

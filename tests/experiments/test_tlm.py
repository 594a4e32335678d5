"""experiments/tlm: both kinds of rows say the same, and the test counts a row once."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.equal_time.experiment import Training
from experiments.equal_time.points import Point
from experiments.tlm.material import make_shards
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.evaluate.data.metrics import paired_test

TLM = Path(__file__).resolve().parents[2] / "experiments/tlm"
LANGUAGES = ["fr", "sw"]


@pytest.fixture(scope="module")
def outcome():
    spec = importlib.util.spec_from_file_location("tlm_outcome", TLM / "outcome.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def xnli(tmp_path):
    words = {"en": "the old house by the river", "fr": "la vieille maison du fleuve", "sw": "nyumba ya zamani ya mto"}
    for language, text in words.items():
        rows = [{"premise": f"{text} {number}", "hypothesis": f"{text} {number}!", "label": 0} for number in range(60)]
        path = tmp_path / "xnli" / language / "train.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path / "xnli"


def lines_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_single_sentences_and_pairs_have_the_same_text_and_shares_of_languages(xnli, tiny_tokenizer, tmp_path):
    shards = make_shards(xnli, LANGUAGES, tiny_tokenizer, 100, 64, tmp_path / "material")
    manifest = ShardDataset.open(shards).manifest
    documents = {
        name: sum(entry[split]["documents"] for split in ("train", "validation"))
        for name, entry in (manifest["languages"] | manifest["pairs"]).items()
    }
    assert documents == {"en": 2 * 120, "fr": 120, "sw": 120, "en+fr": 120, "en+sw": 120}
    assert manifest["tokenizer"]["vocab_size"] == 102
    text = lines_of(tmp_path / "material/text/sw.jsonl.gz")
    pairs = lines_of(tmp_path / "material/pairs/en-sw.jsonl.gz")
    assert [row["sw"] for row in pairs] == [row["text"] for row in text]
    assert pairs[3] == {"en": "the old house by the river 1!", "sw": "nyumba ya zamani ya mto 1!"}


def test_training_sets_that_are_not_parallel_are_refused(xnli, tiny_tokenizer, tmp_path):
    path = xnli / "sw" / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in lines_of(path)[:-1]).encode()))
    with pytest.raises(UserError, match="sw has 59 training rows and en 60; they must be translations"):
        make_shards(xnli, LANGUAGES, tiny_tokenizer, 100, 64, tmp_path / "material")
    with pytest.raises(UserError, match=r"--data: .*tr/train\.jsonl\.gz is not there"):
        make_shards(xnli, ["tr"], tiny_tokenizer, 100, 64, tmp_path / "material")


def test_a_pretraining_on_pairs_has_a_folder_of_its_own():
    plain, pairs = (Training(Point("clustered", 64), 1e-3, 2, share) for share in (0.0, 0.5))
    assert plain.name == "clustered-64-lr0.001-seed2"
    assert pairs.name == "clustered-64-tlm0.5-lr0.001-seed2"


def test_the_tests_are_over_rows_in_all_other_languages_and_only_of_seeds_with_both(outcome, tmp_path):
    draw = np.random.default_rng(0)
    labels = {each: "".join(map(str, draw.integers(0, 3, 400))) for each in ("en", *LANGUAGES)}
    gold = {each: np.array(list(text)) for each, text in labels.items()}
    models, right = [], {}
    for arm, seed, chance in (("sentences", 0, 0.4), ("pairs", 0, 0.7), ("sentences", 1, 0.4)):
        answers = {}
        for each in gold:
            knows = draw.random(400) < chance
            right[arm, seed, each] = knows
            answers[each] = "".join(np.where(knows, gold[each], (gold[each].astype(int) + 1) % 3))
        model = {"arm": arm, "seed": seed, "labels": labels, "predictions": {str(seed): answers}}
        models.append(model | {"pretraining": {"loss": 5.0}, "finetuning": {"score": 0.5}})
    table = outcome.write_outcome(tmp_path, {"languages": LANGUAGES}, models, 1.5).splitlines()
    results = read_json(tmp_path / "results.json")
    comparison = results["comparison"]
    ours, theirs = (np.mean([right[arm, 0, each] for each in LANGUAGES], axis=0) for arm in ("pairs", "sentences"))
    assert comparison["seeds"] == [0]
    assert comparison["transfer"] == comparison["each_seed"][0] == paired_test(ours, theirs)
    assert comparison["transfer"]["difference"] == pytest.approx(ours.mean() - theirs.mean()) != 0
    english = right["pairs", 0, "en"].mean() - right["sentences", 0, "en"].mean()
    assert comparison["languages"]["en"]["difference"] == pytest.approx(english)
    transfers = [
        np.mean([right[arm, seed, each] for each in LANGUAGES])
        for arm, seed in (("sentences", 0), ("pairs", 0), ("sentences", 1))
    ]
    assert [model["transfer"] for model in results["models"]] == pytest.approx(transfers)
    assert table[2].startswith("| sentences | 0 | ")
    assert table[-1].endswith(f"**{100 * comparison['transfer']['difference']:+.1f}** | 0.0001 |")
    assert (tmp_path / "tlm.png").read_bytes().startswith(b"\x89PNG")

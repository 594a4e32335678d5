"""The one-file form of our code, in a process that cannot import ksub_ds."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, compress, positional_codes
from ksub_ds.convert.remote_code import FILE, write_remote_code

LOAD = """
import json, sys
sys.modules["ksub_ds"] = None  # any import of it raises ImportError
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
results = []
for folder in sys.argv[1:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        loss, logits = model(ids, labels=ids.flip(1)).loss.item(), model(ids).logits.double().sum().item()
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    head = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    shared = [torch.equal(bare.state_dict()[k], v) for k, v in model.base_model.state_dict().items()]
    shared += [torch.equal(head.base_model.state_dict()[k], v) for k, v in model.base_model.state_dict().items()]
    model.resize_token_embeddings(205)
    model.save_pretrained(folder + "/again")
    again = AutoModelForMaskedLM.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    with torch.no_grad():
        grown = torch.equal(again(ids).logits, model(ids).logits)
    results.append([loss, logits, all(shared), len(shared), grown, type(model).__name__])
print(json.dumps(results))
"""


def small_models():
    torch.manual_seed(0)
    yield KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=200), positional_codes(200, 3)).eval()
    size = {"vocab_size": 200, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", intermediate_size=16, **size))
    yield compress(plain.eval(), positional_codes(200, 2))


@pytest.mark.timeout(200)
def test_folders_open_where_ksub_ds_is_not(tmp_path):
    expected, folders = [], []
    for number, model in enumerate(small_models()):
        folder = tmp_path / f"model{number}"
        model.save_pretrained(folder)
        write_remote_code(folder, model)
        source = (folder / FILE).read_text()
        assert "import ksub_ds" not in source and "from ksub_ds" not in source
        ids = torch.arange(24).reshape(2, 12)
        with torch.no_grad():
            loss, logits = model(ids, labels=ids.flip(1)).loss.item(), model(ids).logits.double().sum().item()
        expected.append([loss, logits, type(model).__name__])
        folders.append(str(folder))
        # With ksub_ds at hand, the installed classes are taken and no code of the folder runs.
        assert type(AutoModelForMaskedLM.from_pretrained(folder)) is type(model)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (loss, logits, name), found in zip(expected, json.loads(done.stdout), strict=True):
        assert found[0] == pytest.approx(loss, rel=1e-6) and found[1] == pytest.approx(logits, rel=1e-4, abs=1e-3)
        assert found[2] and found[3] > 10 and found[4] and found[5] == name


def test_without_trust_no_code_runs(tmp_path):
    model = next(small_models())
    model.save_pretrained(tmp_path)
    write_remote_code(tmp_path, model)
    code = (
        "import sys; sys.modules['ksub_ds'] = None\n"
        "from transformers import AutoModelForMaskedLM as A\n"
        "A.from_pretrained(sys.argv[1], trust_remote_code=False)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr

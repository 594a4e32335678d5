"""Registration with transformers' Auto classes: by `import ksub_ds` in any order, but not in our own programs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENCODERS = ("Roberta", "Bert", "Electra", "DistilBert", "ModernBert")
CAUSAL = ("Llama", "Mistral", "Qwen3", "Gemma3Text", "GPT2")
TOKENS = {"Model": ENCODERS + CAUSAL, "ForCausalLM": CAUSAL, "ForMaskedLM": ENCODERS}
ANSWERS = tuple(family for family in ENCODERS + CAUSAL if family != "Gemma3Text")
TASKS = {
    "ForSequenceClassification": ENCODERS + CAUSAL,
    "ForTokenClassification": ANSWERS,
    "ForQuestionAnswering": ANSWERS,
    "ForMultipleChoice": ENCODERS,
}
WANTED = [f"KSub{family}{head}" for head, families in (TOKENS | TASKS).items() for family in families]
LOOK_UP = """
import transformers
for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
             "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice"):
    known = getattr(transformers, auto)._model_mapping
    for name in ("roberta", "bert", "electra", "distilbert", "modernbert", "llama", "mistral", "qwen3", "gemma3_text",
                 "gpt2"):
        found = known.get(type(transformers.AutoConfig.for_model(f"ksub_{name}")), None)
        if found is not None:
            print(found.__name__)
"""
HEAVY = "print(*sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"


def output(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import ksub_ds",
        "from transformers import AutoConfig; import ksub_ds",
        "from transformers import AutoModelForMaskedLM, AutoModelForCausalLM; import ksub_ds",
        "import ksub_ds; from transformers import BertModel, LlamaForCausalLM",
    ],
)
def test_import_registers_every_class_in_any_order(imports):
    assert output("-c", imports + LOOK_UP).split() == WANTED


def test_ksub_help_imports_neither_torch_nor_transformers(tmp_path):
    script = tmp_path / "ksub"  # what pip makes of the entry point
    script.write_text(
        f"import sys\nfrom ksub_ds.cli import main\nassert main(['--help']) == 0\n{HEAVY}\n", encoding="utf-8"
    )
    assert output(str(script)).endswith("of a command.\n\n")


@pytest.mark.parametrize("command", [["pretrain"], ["evaluate", "xnli"], ["evaluate", "classify"], ["compress"]])
def test_the_help_of_a_command_imports_neither(tmp_path, command):
    script = tmp_path / "ksub"
    lines = ("import contextlib, sys", "from ksub_ds.cli import main", "with contextlib.suppress(SystemExit):")
    script.write_text("\n".join([*lines, f"    main({[*command, '--help']})", HEAVY, ""]), encoding="utf-8")
    assert output(str(script)).endswith("\n\n")


@pytest.mark.parametrize("module", ["ksub_ds.cli", "ksub_ds.cluster.launch", "ksub_ds.cluster.supervisor"])
def test_our_modules_start_light(module, tmp_path):
    """`python -m` in a process that prints, when it ends, which heavy packages were imported."""
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, sys\natexit.register(lambda: {HEAVY})\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-u", "-m", module, "--help"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.endswith("\n\n") or done.stdout == "\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("program", "ours"),
    [
        ("/usr/local/bin/ksub", True),
        (str(ROOT / "launch/pretrain.sh"), True),
        (str(ROOT / "preprocessing/shard_cc.py"), True),
        (str(ROOT / "ksub_ds/pretrain/__main__.py"), True),
        (str(ROOT / "experiments/demo/fill_mask.py"), False),
        ("/home/me/train.py", False),
        ("-c", False),
        ("", False),
    ],
)
def test_our_own_programs_are_known(program, ours, monkeypatch):
    import ksub_ds

    monkeypatch.setattr(sys, "argv", [program, "-m", "ksub_ds.cli"])
    assert ksub_ds._is_own_program() is ours


@pytest.mark.parametrize(
    ("words", "ours"), [(["-m", "ksub_ds.pretrain"], True), (["-mksub_ds.pretrain"], True), (["-m", "pytest"], False)]
)
def test_a_module_of_ours_is_known_while_python_looks_for_it(words, ours, monkeypatch):
    import ksub_ds

    monkeypatch.setattr(sys, "argv", ["-m", "--out", "run"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *words, "--out", "run"])
    assert ksub_ds._is_own_program() is ours

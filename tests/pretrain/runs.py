"""Runs that several tests look at. Each process start costs seconds, so recipes share processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
STEPS = 20
Outcome = list[Any]  # exit code, error text or what is held of the parameters, of each rank


@dataclass(frozen=True)
class Bench:
    """Where the runs are, and the arguments that all share."""

    folder: Path
    data: Path
    codes: Path

    def arguments(self, name: str, *more: str, **settings: Any) -> list[str]:
        """The command line of the run `name`: tiny, 20 steps, 8 sequences a step, dropout on, saved every 5 steps."""
        values = {"preset": "tiny", "codes": self.codes, "data": self.data, "out": self.folder / name}
        values |= {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "save_every_steps": 5}
        values |= {"keep_last": 9, "log_every_steps": 5, "eval_every": 10, "eval_sequences": 6, "precision": "fp32"}
        values |= settings
        pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in values.items() if value is not None)
        return [*(part for pair in pairs for part in pair), *more]

    def start(self, name: str, *more: str, limit: Callable[[], None] | None = None, **settings: Any) -> Any:
        """Start `python -m ksub_ds.pretrain` for the run `name`."""
        command = [sys.executable, "-m", "ksub_ds.pretrain", *self.arguments(name, *more, **settings)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(), preexec_fn=limit)

    def copy(self, source: str, name: str, last_step: int) -> Path:
        """A copy of a run as it was when checkpoint `last_step` was its newest."""
        target = self.folder / name
        shutil.copytree(self.folder / source, target)
        for path in (target / "checkpoints").iterdir():
            if int(path.name.removeprefix("global_step")) > last_step:
                shutil.rmtree(path)
        return target

    def run_all(self, ranks: int, entries: list[dict[str, Any]]) -> list[Outcome]:
        """Run recipes one after the other on `ranks` ranks, in one start."""
        listed, results = self.folder / "list.json", self.folder / "results.json"
        listed.write_text(json.dumps(entries))
        results.unlink(missing_ok=True)
        python = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*python, str(HERE / "run_recipes.py"), str(listed), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=280)
        assert results.exists(), done.stderr[-4000:]
        return json.loads(results.read_text())


def environment() -> dict[str, str]:
    """One thread a rank, no GPU, nothing of an outer launcher."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every step, which must be 1, 2, 3, ..."""
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def state_bytes(run: Path, step: int) -> tuple[bytes, bytes]:
    """Weights and optimizer of a checkpoint, as they lie on the disk."""
    folder = run / "checkpoints" / f"global_step{step}"
    return (folder / "model.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


@pytest.fixture(scope="session")
def bench(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder for runs, with codes that fit the shards."""
    from ksub_ds import positional_codes
    from ksub_ds.corpus.shards.dataset import ShardDataset

    folder = tmp_path_factory.mktemp("runs")
    vocab_size = ShardDataset.open(tiny_shards).manifest["tokenizer"]["vocab_size"]
    positional_codes(vocab_size, 3).save(folder / "codes.safetensors")
    positional_codes(vocab_size + 1, 3).save(folder / "other.safetensors")
    return Bench(folder, tiny_shards, folder / "codes.safetensors")


@pytest.fixture(scope="session")
def bpe_shards(tiny_text: Path, tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards by a byte-level BPE tokenizer (roberta-base's kind), with a code file of its vocabulary beside them."""
    from ksub_ds import positional_codes
    from ksub_ds.corpus.text.pipeline import ShardText, shard_text

    out = tmp_path_factory.mktemp("bpe") / "shards"
    manifest = shard_text(ShardText(tiny_text, tiny_bpe, out, sequence_length=64, validation_fraction=0.1, workers=1))
    positional_codes(manifest["tokenizer"]["vocab_size"], 2).save(out.parent / "codes.safetensors")
    return out


MODERNBERT = {"preset": "small_modernbert", "max_steps": 3, "eval_every": 3, "eval_sequences": 2}


@pytest.fixture(scope="session")
def one_rank(bench: Bench, bpe_shards: Path) -> dict[str, Outcome]:
    """Runs on one rank: `reference` is what every other fp32 run is held against."""
    roberta = {"preset": "roberta_medium", "data": bpe_shards, "codes": bpe_shards.parent / "codes.safetensors"}
    recipes = {
        "reference": {},
        "zero0": {"deepspeed": "zero0"},
        "zero2": {"deepspeed": "zero2"},
        "bf16": {"precision": "bf16"},
        "plain": {"codes": None},
        "modernbert": MODERNBERT,
        "roberta": roberta | {"max_steps": 3, "global_batch_size": 4, "eval_every": 3, "eval_sequences": 2},
    }
    more = {"plain": ["--plain"]}
    entries = [{"arguments": bench.arguments(name, *more.get(name, []), **recipes[name])} for name in recipes]
    return dict(zip(recipes, bench.run_all(1, entries), strict=True))

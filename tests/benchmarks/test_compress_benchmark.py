"""benchmarks/compress.py at a small size: both forms are measured, and the numbers kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_forms_are_measured(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "compress.py", "--num-tokens", "3000", "--width", "16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--json", tmp_path / "compress.json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "compress.json").read_text())
    assert (kept["num_tokens"], kept["width"]) == (3000, 16)
    for part, tables in (("input-only", None), ("decoder", 3)):
        row = kept[part]
        assert f"| {part}" in done.stdout and 0 < row["error"] < 1
        assert row["processor_seconds"] > 0 and 0.1 < row["peak_gigabytes"] < 3
        assert tables is None or (row["tables"], row["table_size"]) == (tables, 128)

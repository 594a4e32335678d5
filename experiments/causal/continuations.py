"""Continue held-out text in several languages with an exported causal model.

    python experiments/causal/continuations.py --model EXPORT --data shards --out continuations.md

`import ksub_ds` is all that transformers' Auto classes need to know the model.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ksub_ds  # noqa: F401 - registers the model with the Auto classes
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import atomic_path
from ksub_ds.corpus.shards.dataset import ShardDataset

LANGUAGES = ("en", "de", "ru", "sw", "zh")


def main() -> None:
    """Parse the options, generate, print and write."""
    parser = argparse.ArgumentParser(description="Continue held-out text with a causal model.")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder written by `ksub export`")
    add("--data", type=Path, required=True, help="shards")
    add("--out", type=Path, required=True, help="Markdown file")
    add("--languages", nargs="+", default=LANGUAGES, help="of which those are taken that the shards hold out text of")
    add("--row", type=int, default=3, help="of each language's held-out rows, that gives the beginning")
    add("--prompt", type=int, default=16, help="tokens that are given")
    add("--new", type=int, default=24, help="tokens that are written")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    dataset = ShardDataset.open(options.data, verify=False)
    lines = ["| language | given | written, by sampling the likeliest 90 % |", "|---|---|---|"]
    for language in options.languages:
        count = dataset.num_sequences("validation", language)
        if not count:
            continue
        row = dataset.gather("validation", np.array([options.row % count]), language)[0, : options.prompt]
        given = torch.from_numpy(row.astype(np.int64))[None]
        torch.manual_seed(0)
        written = model.generate(given, max_new_tokens=options.new, do_sample=True, top_p=0.9, temperature=0.8)
        texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (row, written[0, options.prompt :]))
        lines.append(" | ".join([f"| {language}", *(text.replace("|", "\\|") for text in texts)]) + " |")
    text = "\n".join(lines)
    with atomic_path(options.out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))

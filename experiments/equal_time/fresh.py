"""Write a model with fresh weights, for `ksub pretrain --warm-start`: a small network over a code file, or plain.

    python experiments/equal_time/fresh.py --preset small_modernbert --codes CODES --data SHARDS --out MODEL \
        --width 192 --layers 4 --seed 0

The network is a preset's, in another size. The decoder's bias starts at the tokens' log frequency, as
`--decoder-bias frequency` has it.
"""

import argparse
from pathlib import Path

import torch

from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.files import atomic_folder
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.model.presets import fresh_model, preset_config
from ksub_ds.pretrain.builders import start_bias
from ksub_ds.pretrain.recipe import CAUSAL_PRESETS


def main() -> None:
    """Parse the options and write the folder."""
    parser = argparse.ArgumentParser(description="Write a small model with fresh weights.")
    parser.add_argument("--preset", required=True, help="of ksub pretrain")
    parser.add_argument("--codes", type=Path, help="[plain]")
    parser.add_argument("--data", type=Path, required=True, help="shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    dataset = ShardDataset.open(options.data, verify=False)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    table = CodeTable.load(options.codes) if options.codes else plain_codes(tokenizer.vocab_size)
    # A causal model has a bias only where it begins at the frequencies.
    bias = {"decoder_bias": True} if options.preset in CAUSAL_PRESETS else {}
    config = preset_config(
        options.preset,
        vocab_size=table.num_tokens,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        # a multiple of 32 near 8/3 d, as the preset's: with its gate as many parameters as two matrices of 4 d
        intermediate_size=32 * round(options.width / 12),
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        **bias,
    )
    torch.manual_seed(options.seed)
    model = fresh_model(config, table)
    start_bias(model, dataset, alpha=1.0)
    with atomic_folder(options.out) as temporary:
        model.save_pretrained(temporary)


if __name__ == "__main__":
    main()

"""Codes from the model itself: does a model that goes on with codes of its own states beat one that keeps its codes?

A model with clustered codes is trained. Its states at the masked positions of training rows, averaged by the token that
was to be predicted, are one vector per token: what the decoder's row has to look like. They are clustered as the
co-occurrence vectors were. Then, for as many steps again and on the same rows: the model with its codes; the model with
the new codes, all other weights kept and the tables fitted to its embedding by least squares; and a fresh model with
the new codes, beside the first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import MASK, SPECIAL, Material
from training import Training, build_model, encode, optimise

from ksub_ds.codes.clustering import clustered_codes
from ksub_ds.convert.compress import compress_with_report
from ksub_ds.corpus.masking import MaskingRule, mask_tokens, sequence_keys
from ksub_ds.corpus.statistics import token_frequency

CODES = "clustered-matched-aligned"
GOING_ON, MOVED, FRESH = f"{CODES}, going on", "states, going on", "states"
NAMES = (CODES, GOING_ON, MOVED, FRESH)
PASS_EPOCH = 2**61  # masks that neither training nor evaluation has
PASS_ROWS = 12_000
PASS_BATCH = 16
PRIOR = 5  # a token seen so often lies half way between the mean of all states and its own


def refine(folder: Path, results: dict[str, Path], training: Training, seed: int) -> None:
    """Train the models of NAMES with one seed and write their result files.

    Args:
        folder: the material.
        results: the JSON file to write for each of NAMES.
        training: the budget of each stage.
        seed: of weights, rows and masks.
    """
    torch.set_num_threads(1)
    material = Material(folder)
    table = material.codes(CODES)
    model = build_model(material, table, False, training, seed)
    optimise(model, material, results[CODES], CODES, training, seed)
    vectors = state_vectors(model, material, training, seed)
    sizes = table.table_sizes
    states = clustered_codes(vectors, len(sizes), max(sizes), seed=seed, workers=1, last_level="matched", align=True)
    weights = np.sqrt(token_frequency([material.rows("train")], table.num_tokens, SPECIAL) + 0.5)
    fitted, report = compress_with_report(model, states, weights=weights)
    about = {"fit_error": report.error}
    optimise(model, material, results[GOING_ON], GOING_ON, training, seed, training.steps)
    optimise(fitted.train(), material, results[MOVED], MOVED, training, seed, training.steps, about)
    optimise(build_model(material, states, False, training, seed), material, results[FRESH], FRESH, training, seed)


@torch.no_grad()
def state_vectors(model: Any, material: Material, training: Training, seed: int) -> np.ndarray:
    """Average the decoder's inputs at masked positions by the masked token; rare tokens are drawn to the mean of all.

    Returns:
        (N, d) float32.
    """
    rows = material.rows("train")
    count_N = torch.zeros(model.config.vocab_size, device=model.device)
    total_Nd = torch.zeros(model.config.vocab_size, model.config.hidden_size, device=model.device)
    rule = MaskingRule(training.mlm_probability, MASK, SPECIAL, model.config.vocab_size)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:PASS_ROWS]
    model.eval()
    for numbers in np.array_split(chosen, -(-len(chosen) // PASS_BATCH)):
        keys = sequence_keys(seed, np.full(len(numbers), PASS_EPOCH), numbers)
        ids, labels = (torch.from_numpy(array).to(model.device) for array in mask_tokens(rows[numbers], keys, rule))
        state_Pd, label_P = encode(model, ids, labels, training.precision)
        total_Nd.index_add_(0, label_P, state_Pd)
        count_N.index_add_(0, label_P, torch.ones_like(label_P, dtype=count_N.dtype))
    model.train()
    mean_d = total_Nd.sum(0) / count_N.sum()
    return ((total_Nd + PRIOR * mean_d) / (count_N + PRIOR).unsqueeze(1)).cpu().numpy()

"""One configuration: a small masked language model, trained for a number of steps, measured on held-out rows.

A plain PyTorch loop over the project's own model, masking and sampling, on one thread (or a GPU, if there is
one). All configurations see the same rows, masks, learning rates and steps; encoder weights start equal for equal
seeds. The held-out measure uses dense logits for all of them.
"""

import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import BOS, EOS, MASK, PAD, SPECIAL, Material
from torch import Tensor
from torch.nn import functional

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import write_json
from ksub_ds.common.logging import Progress
from ksub_ds.corpus.batches import Sampler
from ksub_ds.corpus.masking import IGNORE, MaskingRule, mask_tokens, sequence_keys
from ksub_ds.corpus.statistics import token_frequency
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.roberta import KSubRobertaForMaskedLM
from ksub_ds.model.softmax import factorized_cross_entropy

INITIAL_STD = 0.02
HELD_OUT_EPOCH = 2**62  # masks that no training epoch has
EVALUATIONS = 5
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Training:
    """The budget, equal for all configurations."""

    steps: int
    batch_size: int  # rows per step
    peak_lr: float
    precision: str  # of the encoder: fp32 or bf16
    decoder_bias: str = "zero"  # its initial values: zero, or the tokens' log frequency
    warmup: float = 0.1  # part of the steps
    mlm_probability: float = 0.15
    weight_decay: float = 0.01
    clip: float = 1.0
    hidden_size: int = 192
    layers: int = 4
    heads: int = 3
    feed_forward: int = 768


def train(folder: Path, result: Path, name: str, codes: str, initialise: bool, training: Training, seed: int) -> None:
    """Train one configuration and write its result file.

    Args:
        folder: the material.
        result: JSON file to write at the end.
        codes: which codes (see Material.codes).
        initialise: start the embedding from the co-occurrence vectors rather than at random.
    """
    torch.set_num_threads(1)
    material = Material(folder)
    model = build_model(material, material.codes(codes), initialise, training, seed)
    optimise(model, material, result, name, training, seed)


def optimise(
    model: Any,
    material: Material,
    result: Path,
    name: str,
    training: Training,
    seed: int,
    steps_before: int = 0,
    about: dict[str, float] | None = None,
) -> None:
    """Train a model and write its result file.

    Args:
        model: is changed in place.
        result: JSON file to write at the end.
        name: of the configuration.
        steps_before: of training that it has had; their rows are not read again.
        about: more numbers for the result file.
    """
    rows = material.rows("train")
    model.to(device := torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rule = MaskingRule(training.mlm_probability, MASK, SPECIAL, model.config.vocab_size)
    optimizer = make_optimizer(model, training)
    sampler = Sampler({"all": len(rows)}, 1.0, seed)
    curve: list[dict[str, float]] = []
    if steps_before:
        curve.append({"step": 0, **evaluate(model, material, rule, training.precision)})
    losses, started = [], time.monotonic()
    with Progress(training.steps, "steps", f"{name}, seed {seed}") as progress:
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            epoch, draw, index = sampler.samples(steps_before + step, training.batch_size)
            ids, labels = mask_tokens(rows[index], sequence_keys(seed, epoch, draw), rule)
            # ------------------------------------------------------------------ the step
            input_ids_BT, labels_BT = (torch.from_numpy(array).to(device) for array in (ids, labels))
            decoder_input_Pd, labels_P = encode(model, input_ids_BT, labels_BT, training.precision)
            loss = factorized_cross_entropy(
                decoder_input_Pd, model.get_input_embeddings(), labels_P, model.lm_head.bias
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            optimizer.zero_grad()
            # ---------------------------------------------------------------------------
            losses.append(loss.item())
            if (step + 1) * EVALUATIONS // training.steps > step * EVALUATIONS // training.steps:
                curve.append({"step": step + 1, **evaluate(model, material, rule, training.precision)})
            held_out = f"{curve[-1]['loss']:.3f}" if curve else "-"
            progress.advance(loss=f"{losses[-1]:.3f}", held_out=held_out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    write_json(
        result,
        {
            "name": name,
            "seed": seed,
            "settings": asdict(training),
            "parameters": {"embedding": embedding, "total": parameters},
            "tokens_seen": training.steps * training.batch_size * rows.shape[1],
            "seconds": round(time.monotonic() - started, 1),
            "held_out": curve,
            "training_loss": [round(value, 5) for value in losses],
            **(about or {}),
        },
    )


def build_model(
    material: Material, table: CodeTable, initialise: bool, training: Training, seed: int
) -> KSubRobertaForMaskedLM:
    """Build the model over the codes; the encoder's initial weights depend only on the seed."""
    rows = material.rows("train")
    config = KSubRobertaConfig(
        vocab_size=table.num_tokens,
        hidden_size=training.hidden_size,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        intermediate_size=training.feed_forward,
        max_position_embeddings=rows.shape[1] + 2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        hidden_dropout_prob=0.0,  # less than one epoch: nothing to overfit
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    model = KSubRobertaForMaskedLM(config, table)
    generator = torch.Generator()
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() == 2 and ".tables." not in name
        ):  # models differ in their tables: draw the other weights by name
            generator.manual_seed(seed << 32 | zlib.crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=INITIAL_STD, generator=generator)
    if initialise:
        start_from_vectors(model.get_input_embeddings(), torch.from_numpy(material.vectors()))
    if training.decoder_bias == "frequency":
        start_bias(model, rows)
    return model.train()


@torch.no_grad()
def start_bias(model: Any, rows: np.ndarray) -> None:
    """Start as a unigram model: from zero, the bias would move by the learning rate per step."""
    count = token_frequency([rows], model.config.vocab_size, SPECIAL) + 0.5
    model.lm_head.bias.copy_(torch.from_numpy(np.log(count / count.max())))


@torch.no_grad()
def start_from_vectors(layer: SubEmbedding, vectors_Np: Tensor) -> None:
    """Set the tables so that the layer's embeddings are as close to the vectors as its codes allow.

    The vectors are centred and projected on their d principal directions. Direction j belongs to table j mod K, so
    that each table sees strong and weak ones. The least-squares table is then the mean over the tokens that share
    a row. Each table is scaled to the standard deviation of the usual initial values.
    """
    centred = vectors_Np.double() - vectors_Np.double().mean(0)
    _, _, directions = torch.linalg.svd(centred.T @ centred)
    target_Nd = centred @ directions[: layer.embedding_dim].T
    if target_Nd.shape[1] < layer.embedding_dim:
        raise UserError(f"the vectors have {target_Nd.shape[1]} dimensions, the model needs {layer.embedding_dim}")
    for k, table in enumerate(layer.tables):
        part = target_Nd[:, k :: len(layer.tables)]
        codes = layer.codes[:, k].long()
        total = torch.zeros(table.shape, dtype=torch.float64).index_add_(0, codes, part)
        mean = total / torch.bincount(codes, minlength=len(table)).clamp(min=1).unsqueeze(1)
        table.copy_(mean * (INITIAL_STD / mean.square().mean().sqrt()))


def make_optimizer(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """Make AdamW without decay on vectors (biases, layer norms)."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.peak_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step: int, training: Training) -> float:
    """Warm up linearly, then decay linearly to zero."""
    # Fine-tuning's schedule (ksub_ds.pretrain.schedule) in other words: kept results depend on its rounding.
    warmup = max(1, round(training.warmup * training.steps))
    return training.peak_lr * min((step + 1) / warmup, (training.steps - step) / max(1, training.steps - warmup))


def encode(model: Any, input_ids_BT: Tensor, labels_BT: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return decoder inputs (P, d) in fp32 at the P labelled positions, and their labels (P,).

    Only the encoder computes in bf16: the softmax over N tokens stays in fp32 for plain and coded models alike.
    """
    mask = None if (input_ids_BT != PAD).all() else (input_ids_BT != PAD).long()
    with torch.autocast(input_ids_BT.device.type, torch.bfloat16, enabled=precision == "bf16"):
        states_BTd = model.roberta(input_ids_BT, attention_mask=mask).last_hidden_state
    labelled = labels_BT != IGNORE
    return model.lm_head(states_BTd[labelled].float()), labels_BT[labelled]


@torch.no_grad()
def evaluate(model: Any, material: Material, rule: MaskingRule, precision: str) -> dict[str, float]:
    """Measure mean loss and accuracy on masked tokens of the held-out rows, from dense logits; the masks are fixed."""
    rows = material.rows("validation")
    weight_Nd, bias_N = model.get_input_embeddings().dense_weight(), model.lm_head.bias
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for first in range(0, len(rows), EVALUATION_BATCH):
        numbers = np.arange(first, min(first + EVALUATION_BATCH, len(rows)))
        keys = sequence_keys(0, np.full(len(numbers), HELD_OUT_EPOCH), numbers)
        ids, labels = (torch.from_numpy(array).to(weight_Nd.device) for array in mask_tokens(rows[numbers], keys, rule))
        decoder_input_Pd, labels_P = encode(model, ids, labels, precision)
        logits_PN = decoder_input_Pd @ weight_Nd.T + bias_N
        loss += functional.cross_entropy(logits_PN, labels_P, reduction="sum").item()
        correct += int((logits_PN.argmax(1) == labels_P).sum())
        count += len(labels_P)
    model.train()
    return {"loss": loss / count, "accuracy": correct / count, "count": count}

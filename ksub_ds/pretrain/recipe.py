"""The recipe: every setting of a pretraining run, its presets (the paper's Table 5), and RUN/recipe.json.

A `Recipe` is the command line of `ksub pretrain`. `resolve` fills in what was left out, and the result is written to
RUN/recipe.json before anything else; `changed_keys` says what differs when the run continues. The recipe owns batch,
learning rate, steps, clipping and precision; the files in ds_configs/ own ZeRO and communication, and never these.
"""

import dataclasses
import math
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.common.option_help import Section
from ksub_ds.common.options import parse
from ksub_ds.pretrain.schedule import Schedule, TrainingPlan

Arg = tyro.conf.arg

# The first two are Table 5 of the paper; the others, with schedules of their own, are for experiments and tests.
PRESETS: dict[str, dict[str, Any]] = {
    "roberta_medium": {"max_steps": 250_000, "global_batch_size": 128, "peak_lr": 2e-4, "warmup_fraction": 0.096},
    "xlmr_medium": {"max_steps": 250_000, "global_batch_size": 256, "peak_lr": 2e-4, "warmup_fraction": 0.096},
    "small": {"max_steps": 10_000, "global_batch_size": 32, "peak_lr": 5e-4, "warmup_fraction": 0.1},
    "small_modernbert": {"max_steps": 10_000, "global_batch_size": 32, "peak_lr": 1e-3, "warmup_fraction": 0.05},
    "tiny": {"max_steps": 1_000, "global_batch_size": 32, "peak_lr": 1e-3, "warmup_fraction": 0.1},
    "llama_medium": {"max_steps": 250_000, "global_batch_size": 256, "peak_lr": 2e-4, "warmup_fraction": 0.096},
    "llama_small": {"max_steps": 10_000, "global_batch_size": 32, "peak_lr": 1e-3, "warmup_fraction": 0.05},
    "llama_tiny": {"max_steps": 1_000, "global_batch_size": 32, "peak_lr": 1e-3, "warmup_fraction": 0.1},
}
CAUSAL_PRESETS = tuple(name for name in PRESETS if name.startswith("llama"))

DECAY_FRACTION = 0.1  # of max_steps, for wsd
MOST = 2**31  # of steps, and of sequences in one
ATTENTION = r"sdpa|eager|flash_attention_[23]|kernels-community/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?"


@dataclass(frozen=True)
class Recipe:
    """Pretrain a masked or causal language model. Running the same command again continues the run."""

    # ---- model and data ----
    preset: Literal[
        "roberta_medium",
        "xlmr_medium",
        "small",
        "small_modernbert",
        "tiny",
        "llama_medium",
        "llama_small",
        "llama_tiny",
    ]
    """Model size and schedule: Table 5 of the paper; `small` (6 layers, d = 384) for experiments without a GPU, and
    `small_modernbert`, which needs fewer steps; `tiny` (2 layers, d = 128) for a first try. `llama_...` are causal
    models of the sizes of xlmr_medium, small and tiny."""
    data: Path
    """Folder of token shards, from preprocessing/shard_text.py."""
    out: Path
    """Run folder: recipe, metrics, checkpoints. Created if it does not exist."""
    codes: Path | None = None
    """Code file, from `ksub codes`: trains the sub-embedding model. Give either this or --plain."""
    plain: bool = False
    """Plain embedding (K = 1), the baseline: no code file, N from the tokenizer of the data."""
    objective: Literal["mlm", "clm", "tlm"] | None = None
    """What is learnt: mlm, the masked tokens; clm, every token from those before it; tlm, mlm on rows of pairs only.
    [the preset's: clm for llama_..., else mlm]"""
    warm_start: Path | None = None
    """Start from this model's weights (folder of `ksub compress` or `ksub export`); network and codes are its own,
    and the preset gives the schedule only."""
    distill_from: str | None = None
    """Teacher: folder (or Hub name) of a masked language model with the same tokenizer, plain or ours."""
    distill_weight: float | None = None
    """Share of the divergence from the teacher in the loss; the labels have the rest. [0.5 with --distill-from]"""

    decoder_bias: Literal["zero", "frequency"] = "zero"
    """Initial bias of the decoder: zero as in the paper, or each token's log frequency in the data. The bias moves by
    the learning rate in a step, so from zero it takes thousands of steps to learn what counting gives at once. (A
    model of --warm-start has its own. A causal model has a bias only from `frequency`, and then no --dense
    export.)"""

    # ---- length ----
    max_steps: Annotated[int | None, Section("length")] = None
    """Optimizer steps. [preset: 250000; the small ones 10000, the tiny ones 1000]"""
    extend: bool = False
    """Go on in --out to another --max-steps, from the last checkpoint and with its optimizer, also after the end.
    Needs --out and --max-steps only: all that is not given stays as the run has it, the warm-up's steps too."""
    max_hours: float | None = None
    """Save and stop after this many hours; the same command resumes (launch/pretrain.sbatch runs it again by
    itself). [no limit]"""

    # ---- optimizer (AdamW, linear warm-up, then a schedule) ----
    global_batch_size: Annotated[int | None, Section("optimizer")] = None
    """Sequences per optimizer step, over all ranks. [preset: 256; roberta_medium 128, the small and tiny ones 32]"""
    micro_batch_size: int | None = None
    """Sequences per forward pass of one rank. [the largest that divides, up to 8 on a CPU, 64 on a GPU]"""
    peak_lr: float | None = None
    """Learning rate at the end of the warm-up. [preset: 2e-4; small 5e-4, the other small and the tiny ones
    1e-3]"""
    warmup_steps: int | None = None
    """Steps of linear warm-up. [0.096 x max_steps, as the paper's 24k of 250k; small and the tiny ones 0.1 x,
    small_modernbert and llama_small 0.05 x]"""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: `linear` down to 0, as in the paper; `cosine` down to 0; `wsd` (warm-up,
    stable, decay) stays at the peak until the last --decay-steps, so that --extend can go on as if never ended."""
    decay_steps: int | None = None
    """Steps at the end of wsd that bring the rate down; 0 ends at the peak, for a later --extend. [0.1 x
    max_steps]"""
    weight_decay: float = 0.01
    """On matrices and sub-embedding tables; never on biases and LayerNorm (as fairseq and HuggingFace do)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = 1e-6
    """AdamW's epsilon."""
    gradient_clipping: float = 0.0
    """Largest gradient norm; 0 clips nothing, as in the paper."""

    dropout: float | None = None
    """Of hidden states and attention, Llama's of attention alone, while this run trains; the exported configuration
    keeps the model's own, for fine-tuning. 0 saves time and suits a run that sees its data about once. [the model's:
    0.1, as in the paper; Llama's 0]"""

    # ---- data ----
    mlm_probability: Annotated[float, Section("data")] = 0.15
    """Share of the tokens to predict (80 % masked, 10 % random, 10 % kept)."""
    alpha: float = 1.0
    """Language smoothing: a language is drawn in proportion to (its sequences)^alpha; 1 as in the paper."""
    tlm_share: float = 0.0
    """Share of the rows that are pairs, a text and its translation (shards of shard_text.py --parallel), both sides
    masked: translation language modelling. 1 for pairs only. [0]"""
    reset_positions: bool = True
    """In rows of pairs, the positions of a translation start again where its text's start, as in XLM."""
    seed: int = 0
    """The one seed: weights, order of the data, masks and dropout all follow from it."""

    # ---- engine ----
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, Section("engine")] = None
    """Number format of matrix products; in bf16 all weights stay fp32, fp16 has fp32 masters of half precision ones.
    [bf16 on a GPU, fp32 on a CPU]"""
    attention: str | None = None
    """How attention is computed, by transformers' names: sdpa; eager, on a CPU in bf16 the fastest for rows of 128;
    flash_attention_2 or _3 where the package flash-attn or flash-attn-3 is; or a kernel of the Hub named
    kernels-community/..., such as kernels-community/flash-attn3, which is downloaded. [transformers' choice]"""
    compile: bool | None = None
    """Compile the encoder by torch.compile (the loss has kernels of its own); a line at the start says so, or why it
    cannot be. Results differ by rounding, and by other draws of dropout. [on for a GPU, off on a CPU]"""
    deterministic: bool = False
    """On a GPU, add up in an order that never changes, so that a resumed run is the same bit for bit; costs some
    speed. On a CPU it is always so, and this changes nothing."""
    deepspeed: str = "zero1"
    """DeepSpeed's mechanics: a JSON file, or a name in ds_configs/ (zero0, zero1, zero2, zero3, zero3_offload)."""

    # ---- saving, evaluating, logging ----
    save_every_steps: Annotated[int, Section("saving, evaluation and logging")] = 1_000
    """Write a checkpoint every this many steps (and always at the end)."""
    keep_last: int = 3
    """Keep this many checkpoints."""
    eval_every_steps: Annotated[int, Arg(name="eval-every")] = 1_000
    """Evaluate on the held-out part at step 0, every this many steps and at the end; 0 for never. A run shorter
    than this is not evaluated."""
    eval_sequences: int = 64
    """Held-out sequences per language in one evaluation."""
    log_every_steps: int = 10
    """Measure accuracy, on the last micro-batches, every this many steps; metrics.jsonl has a line for each
    step."""

    @property
    def is_causal(self) -> bool:
        """Whether every token is predicted from those before it."""
        return self.objective == "clm"

    @property
    def masked_share(self) -> float | None:
        """Share of the tokens to predict by masking; None where nothing is masked."""
        return None if self.is_causal else self.mlm_probability

    def plan(self) -> TrainingPlan:
        """Return length and learning rates of a resolved recipe."""
        return TrainingPlan(self.schedule, self.peak_lr, self.warmup_steps, self.max_steps, self.decay_steps or 0)


def resolve(recipe: Recipe, world_size: int, on_gpu: bool, previous_micro_batch_size: int | None = None) -> Recipe:
    """Fill in what was left out, and check the whole.

    Args:
        recipe: as given on the command line.
        world_size: number of ranks.
        on_gpu: whether the ranks have a GPU each; decides the default precision and micro-batch size.
        previous_micro_batch_size: of the run that is continued. Dropout differs from micro-batch to micro-batch, so
            one that was not asked for stays as it was, where the number of ranks allows it.

    Returns:
        The recipe with no setting left open.

    Raises:
        UserError: values that contradict each other, each with the numbers.
    """
    preset, recipe = PRESETS[recipe.preset], _resolve_objective(recipe)
    defaults = {key: preset[key] for key in ("max_steps", "global_batch_size", "peak_lr")}
    defaults["precision"] = "bf16" if on_gpu else "fp32"
    missing = {key: value for key, value in defaults.items() if getattr(recipe, key) is None}
    recipe = dataclasses.replace(recipe, **missing)
    if recipe.distill_from is not None and recipe.distill_weight is None:
        recipe = dataclasses.replace(recipe, distill_weight=0.5)
    whose_warmup = " (the run's)" if recipe.extend else ""
    if recipe.warmup_steps is None:
        whose_warmup = " (the default; --warmup-steps changes it)"
        recipe = dataclasses.replace(recipe, warmup_steps=round(preset["warmup_fraction"] * recipe.max_steps))
    if recipe.schedule == "wsd" and recipe.decay_steps is None:
        room = max(0, recipe.max_steps - recipe.warmup_steps)
        recipe = dataclasses.replace(recipe, decay_steps=min(round(DECAY_FRACTION * recipe.max_steps), room))
    _check_values(recipe, whose_warmup)
    if recipe.precision == "fp16" and not on_gpu:
        raise UserError("--precision fp16: the CPU cannot train in fp16; use --precision fp32 or bf16")
    micro, previous = recipe.micro_batch_size, previous_micro_batch_size
    if micro is None and previous and recipe.global_batch_size % (previous * world_size) == 0:
        micro = previous
    micro = micro or _largest_micro_batch(recipe, world_size, 64 if on_gpu else 8)
    compiled = on_gpu if recipe.compile is None else recipe.compile
    recipe = dataclasses.replace(recipe, micro_batch_size=micro, compile=compiled)
    divide_batch(recipe, world_size)
    return recipe


def _own_objective(preset: str, tlm_share: float) -> Literal["mlm", "clm", "tlm"]:
    """Return the objective of a recipe that names none, as those of older versions do."""
    return "clm" if preset in CAUSAL_PRESETS else "tlm" if tlm_share == 1 else "mlm"


def _resolve_objective(recipe: Recipe) -> Recipe:
    """Fill in the objective, and the share of pairs that it means.

    Raises:
        UserError: a preset of the other kind of network, or a setting of masked models beside clm.
    """
    own, preset = _own_objective(recipe.preset, recipe.tlm_share), recipe.preset
    objective = recipe.objective or own
    if (objective == "clm") != (own == "clm"):
        kind = "a causal network, which learns clm" if own == "clm" else "an encoder, which learns mlm or tlm"
        fitting = [name for name in PRESETS if (name in CAUSAL_PRESETS) == (objective == "clm")]
        raise UserError(
            f"--objective {objective}: --preset {preset} is {kind}; leave --objective out, or take --preset "
            f"{' or '.join(fitting)}"
        )
    if objective == "tlm" and recipe.tlm_share not in (0, 1):
        raise UserError(f"--tlm-share {recipe.tlm_share}: --objective tlm trains on pairs only; give either")
    only_masked = ("tlm_share", "distill_from", "mlm_probability")
    wrong = next((key for key in only_masked if getattr(recipe, key) != getattr(Recipe, key)), None)
    if objective == "clm" and wrong is not None:
        raise UserError(
            f"{_flag(wrong)} {getattr(recipe, wrong)}: belongs to masked models; --preset {preset} learns clm, each "
            "token from those before it; leave it out"
        )
    if "tlm" in (objective, own):
        return dataclasses.replace(recipe, objective="tlm", tlm_share=1.0)
    return dataclasses.replace(recipe, objective=objective)


def extends_a_run(words: Sequence[str]) -> bool:
    """Return whether a command line asks for --extend, and so has its defaults in a run folder."""
    return "--extend" in words and "--help" not in words and "-h" not in words


def parse_recipe(arguments: Sequence[str] | None) -> Recipe:
    """Parse the command line of `ksub pretrain`; with --extend, the defaults are the settings of the run in --out.

    Args:
        arguments: the words behind the command; None takes those of this process.

    Raises:
        UserError: what is wrong with the arguments, or there is no run to extend.
        SystemExit: --help was given, and is printed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not extends_a_run(words):
        return parse(Recipe, words, "ksub pretrain")
    run = _run_to_extend(words)
    kept = _kept_copies(run)
    open_settings = {"max_steps": None, "max_hours": None, "micro_batch_size": None}
    recipe = parse(Recipe, words, "ksub pretrain", dataclasses.replace(run, **open_settings, **kept))
    if recipe.max_steps is None:
        raise UserError(f"--extend: give --max-steps, the last step to go on to; the run has {run.max_steps}")
    _check_sources(recipe, run)
    if recipe.schedule != "wsd" and recipe.decay_steps == run.decay_steps:
        return dataclasses.replace(recipe, decay_steps=None)
    return recipe


def _run_to_extend(words: list[str]) -> Recipe:
    """Return the recipe of the run in --out.

    Raises:
        UserError: no --out, no run there, or one whose recipe no run can have.
    """
    values = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == "--out"]
    values += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    if not values or not values[-1]:
        raise UserError("--extend: name with --out the run folder to go on in")
    path = Path(values[-1]) / "recipe.json"
    if not path.is_file():
        raise UserError(f"--extend: {path} is not there; leave --extend out to start a run")
    recipe, _ = read_recipe(path)
    try:
        _check_values(recipe, "")
    except UserError as error:
        raise UserError(f"{path}: {error}; the file is damaged, restore it") from error
    return dataclasses.replace(recipe, out=Path(values[-1]))


def _kept_copies(run: Recipe) -> dict[str, Any]:
    """Return the run's own copies of what its recipe names and is not there from here; sha256 will tell others apart.

    What is there is taken: other ranks may not see the run folder.
    """
    copies = {"codes": run.out / "codes.safetensors", "warm_start": run.out / "warm_start"}
    named = {key: getattr(run, key) for key in copies}
    return {key: copies[key] for key, path in named.items() if path and not path.exists() and copies[key].exists()}


def _check_sources(recipe: Recipe, run: Recipe) -> None:
    """Check that what only recipe.json names is there: its paths may be relative to where the run was started.

    Raises:
        UserError: a path that is not there, with the option that gives another.
    """
    for key in ("data", "codes", "warm_start"):
        path = getattr(recipe, key)
        if path is not None and path == getattr(run, key) and not path.exists():
            raise UserError(
                f"{_flag(key)} {path} (from {run.out / 'recipe.json'}): is not there from here; give {_flag(key)} PATH"
            )


def _check_values(recipe: Recipe, whose_warmup: str) -> None:
    if recipe.warm_start is not None and recipe.plain:
        raise UserError("--plain: --warm-start brings its own codes; leave it out")
    if recipe.warm_start is not None and recipe.decoder_bias != "zero":
        raise UserError("--decoder-bias frequency: --warm-start brings its own bias; leave it out")
    if recipe.warm_start is None and (recipe.codes is None) == (not recipe.plain):
        raise UserError("give either --codes FILE (sub-embeddings) or --plain (the K = 1 baseline)")
    for key in (
        *("max_steps", "max_hours", "global_batch_size", "micro_batch_size", "peak_lr", "adam_epsilon"),
        *("save_every_steps", "keep_last", "eval_sequences", "log_every_steps"),
    ):
        value = getattr(recipe, key)
        if value is not None and not value > 0:
            raise UserError(f"{_flag(key)} {value}: must be greater than 0")
        if isinstance(value, int) and value >= MOST:
            raise UserError(f"{_flag(key)} {value}: must be less than 2^31")
    for key in ("weight_decay", "gradient_clipping", "eval_every_steps", "seed"):
        if not getattr(recipe, key) >= 0:
            raise UserError(f"{_flag(key)} {getattr(recipe, key)}: must not be negative")
    for key in ("max_hours", "peak_lr", "weight_decay", "adam_epsilon", "gradient_clipping"):
        value = getattr(recipe, key)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{_flag(key)} {value}: must be a finite number")
    try:
        str(recipe.out).encode()
    except UnicodeEncodeError as error:
        raise UserError("--out: its name is not UTF-8, in which DeepSpeed needs it; choose another") from error
    if recipe.seed >= 2**63:
        raise UserError(f"--seed {recipe.seed}: must be less than 2^63 = {2**63}")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(recipe, key) < 1:
            raise UserError(f"{_flag(key)} {getattr(recipe, key)}: must lie in [0, 1)")
    if recipe.distill_weight is not None and not (recipe.distill_from is not None and 0 < recipe.distill_weight <= 1):
        raise UserError(f"--distill-weight {recipe.distill_weight}: must lie in (0, 1], together with --distill-from")
    if recipe.attention is not None and not re.fullmatch(ATTENTION, recipe.attention):
        raise UserError(
            f"--attention {recipe.attention}: must be sdpa, eager, flash_attention_2, flash_attention_3 or a kernel of "
            "the Hub named kernels-community/..., such as kernels-community/flash-attn3"
        )
    if recipe.dropout is not None and not 0 <= recipe.dropout < 1:
        raise UserError(f"--dropout {recipe.dropout}: must lie in [0, 1)")
    if not 0 < recipe.alpha <= 1:
        raise UserError(f"--alpha {recipe.alpha}: must lie in (0, 1]")
    if not 0 <= recipe.tlm_share <= 1:
        raise UserError(f"--tlm-share {recipe.tlm_share}: must lie in [0, 1]")
    if not 0 < recipe.mlm_probability < 1:
        raise UserError(f"--mlm-probability {recipe.mlm_probability}: must lie in (0, 1)")
    if not 0 <= recipe.warmup_steps <= recipe.max_steps:
        raise UserError(f"--warmup-steps {recipe.warmup_steps}: must lie in 0..max_steps = {recipe.max_steps}")
    if recipe.decay_steps is not None and recipe.schedule != "wsd":
        raise UserError(f"--decay-steps {recipe.decay_steps}: belongs to --schedule wsd, not {recipe.schedule}")
    room = recipe.max_steps - recipe.warmup_steps
    if recipe.decay_steps is not None and not 0 <= recipe.decay_steps <= room:
        raise UserError(
            f"--decay-steps {recipe.decay_steps}: must lie in 0..{room}: max_steps {recipe.max_steps} less "
            f"{recipe.warmup_steps} steps of warm-up{whose_warmup}"
        )


def _flag(key: str) -> str:
    return "--eval-every" if key == "eval_every_steps" else "--" + key.replace("_", "-")


def _largest_micro_batch(recipe: Recipe, world_size: int, limit: int) -> int:
    per_rank = max(1, recipe.global_batch_size // world_size)
    small = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
    return max(size for each in small for size in (each, per_rank // each) if size <= limit)


def smaller_micro_batch(recipe: Recipe, world_size: int) -> int | None:
    """Return the largest micro-batch size that divides and is at most half of a resolved recipe's; None below 1."""
    half = recipe.micro_batch_size // 2
    return _largest_micro_batch(recipe, world_size, half) if half else None


@dataclass(frozen=True)
class BatchSizes:
    """How the sequences of one optimizer step are divided: micro x accumulation x world = global.

    Attributes:
        micro: sequences in one forward pass of one rank.
        accumulation: micro-batches per rank and optimizer step.
        world: number of ranks.
    """

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        """Sequences per optimizer step over all ranks: the global batch size."""
        return self.micro * self.accumulation * self.world

    def __str__(self) -> str:
        return f"micro {self.micro} x accumulation {self.accumulation} x ranks {self.world} = {self.total}"


def divide_batch(recipe: Recipe, world_size: int) -> BatchSizes:
    """Divide the global batch of a resolved recipe over the ranks.

    Raises:
        UserError: the sizes do not divide, with the numbers and sizes that would.
    """
    micro, total = recipe.micro_batch_size, recipe.global_batch_size
    if total % (micro * world_size):
        nearest = max(1, round(total / (micro * world_size))) * micro * world_size
        raise UserError(
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {micro} x {world_size} ranks = "
            f"{micro * world_size}; the nearest that is: {nearest}"
        )
    sizes = BatchSizes(micro, total // (micro * world_size), world_size)
    assert sizes.total == total
    return sizes


# May change between a start and its continuation: they do not affect what is learnt. The codes and the data may move
# to another folder: their content is compared, not their path.
FREE_KEYS = (
    *("codes", "data", "out", "warm_start", "deepspeed", "micro_batch_size", "max_hours"),
    *("attention", "compile", "deterministic"),
    *("save_every_steps", "keep_last", "eval_every_steps", "eval_sequences", "log_every_steps"),
)

TEACHER = "distill_from_sha256"  # key of recipe.json
# What an extension may change.
PLAN_KEYS = ("max_steps", "schedule", "decay_steps")
# The file has these where they are not the default.
LATER_KEYS = ("schedule", "decay_steps", "tlm_share", "reset_positions")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values: of the run, so without what says how this start goes on."""
    values = dataclasses.asdict(recipe)
    del values["extend"]
    for key in LATER_KEYS:
        if values[key] == getattr(Recipe, key):
            del values[key]
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def from_json(values: Any, path: Path) -> Recipe:
    """Return the recipe in the content of a RUN/recipe.json. Unknown keys belong to the run and are ignored.

    Args:
        values: content of the file.
        path: the file, for the error.

    Raises:
        UserError: not an object, a key is missing, or a value does not fit its setting.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; the file is damaged, or not written by `ksub pretrain`")
    hints = get_type_hints(Recipe)
    known: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{path}: lacks the key {field.name!r}; the file is damaged")
            continue
        value, hint = values[field.name], hints[field.name]
        if not _fits(value, hint):
            choices = f"; it must be one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else ""
            raise UserError(f"{path}: {field.name} cannot be {value!r}{choices}")
        known[field.name] = (
            Path(value) if field.name in ("data", "out", "codes", "warm_start") and value is not None else value
        )
    recipe = Recipe(**known)
    if recipe.objective is None:
        return dataclasses.replace(recipe, objective=_own_objective(recipe.preset, recipe.tlm_share))
    return recipe


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value fits a field of this type; a path is a string, a float may be whole."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) in {Path: (str,), float: (float, int)}.get(hint, (hint,))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Read a RUN/recipe.json.

    Returns:
        The recipe, and the whole content of the file.

    Raises:
        UserError: the file cannot be read, or does not hold a recipe.
    """
    values = read_json(path)
    return from_json(values, path), values


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Compare the contents of two recipe.json files.

    A setting that a file lacks has its default, and the objective is the preset's.

    Args:
        old: content of the file in the run folder.
        new: content that the continuation would write.

    Returns:
        Each difference that is not allowed, as `key: old -> new`.
    """
    # A teacher may move as the data may, where both files say what it holds; what earlier versions wrote does not.
    both = TEACHER in old and TEACHER in new
    free = {*FREE_KEYS, "distill_from" if both else TEACHER}
    fields = dataclasses.fields(Recipe)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    if "preset" in old:
        defaults["objective"] = _own_objective(old["preset"], old.get("tlm_share", 0.0))
    old = defaults | old
    keys = [*new, *(key for key in old if key not in new)]
    new = defaults | new
    pairs = {key: (old.get(key), new.get(key)) for key in keys if key not in free}
    return [f"{key}: {before} -> {now}" for key, (before, now) in pairs.items() if before != now]

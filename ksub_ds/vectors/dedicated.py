"""Choose the tokens that get a row of their own (dedicated rows): `ksub codes dedicate`, and other commands' options.

ksub codes dedicate codes.safetensors --rows 2048 --data shards --out out.safetensors      the most frequent tokens
ksub codes dedicate codes.safetensors --rows 2048 --by-loss run --out out.safetensors      of the greatest loss
ksub codes dedicate codes.safetensors --tokens ids.txt --out out.safetensors               those of a list

Tokens that have such a row already keep it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ksub_ds.codes.table import CodeTable, check_code_output
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import training_frequency
from ksub_ds.pretrain.open_run import is_run, open_run

LARGEST_FILE = 2**26  # bytes of a list: more is another kind of file
MASKED_SHARE = 0.15  # of the held-out text whose loss is summed, where no run says
TOKENIZER = "tokenizer_fingerprint"


@dataclass(frozen=True)
class DedicateCodes:
    """Give tokens of a code file rows of their own beside the shared ones; those that have one keep it."""

    codes: Annotated[Path, tyro.conf.Positional]
    """The code file."""
    out: Path
    """The code file to write."""
    rows: int | None = None
    """F, how many tokens: the most frequent ones of --data, or those with the greatest loss by --by-loss."""
    data: Path | None = None
    """Shards folder whose training part is counted. With --by-loss: whose held-out part is read. [the run's]"""
    tokens: Path | None = None
    """In place of --rows: a file of token ids, one per line; empty lines and what follows a # do not count."""
    by_loss: Path | None = None
    """Run or model folder: take the tokens where its loss over the held-out text, summed, is greatest."""


@dataclass(frozen=True)
class DedicatedChoice:
    """How the tokens are chosen; the fields are options of a command, None where they were left out.

    Attributes:
        rows: F, how many.
        data: shards folder.
        tokens: file of token ids.
        by_loss: run or model folder.
        prefix: of these options' names in that command, --data excepted.
    """

    rows: int | None = None
    data: Path | None = None
    tokens: Path | None = None
    by_loss: Path | None = None
    prefix: str = "--dedicated-"

    def __post_init__(self) -> None:
        """Check that the options belong together, before any long work.

        Raises:
            UserError: they do not.
        """
        rows, tokens, by_loss = (f"{self.prefix}{name}" for name in ("rows", "tokens", "by-loss"))
        others = [name for name, value in ((rows, self.rows), (by_loss, self.by_loss)) if value is not None]
        if self.tokens is not None and others:
            raise UserError(f"{tokens} {self.tokens}: names the tokens; leave {' and '.join(others)} out")
        if self.by_loss is not None and self.rows is None:
            raise UserError(f"{by_loss} {self.by_loss}: give {rows} F too, how many tokens")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"{rows} {self.rows}: must be at least 1; leave it out for none")
        if self.rows is not None and self.data is None and self.by_loss is None:
            raise UserError(f"{rows} {self.rows}: give --data SHARDS too, where tokens are counted")

    def check_data_is_read(self) -> None:
        """Refuse --data of a command that has no other use for it, where no tokens are counted.

        Raises:
            UserError: nothing would read it.
        """
        if self.data is not None and self.rows is None:
            raise UserError(f"--data {self.data}: is read with {self.prefix}rows F only; leave it out")

    @property
    def is_empty(self) -> bool:
        """Whether no token is chosen."""
        return self.rows is None and self.tokens is None


def dedicate_code_file(settings: DedicateCodes) -> CodeTable:
    """Write the code file with dedicated tokens.

    Args:
        settings: the options of `ksub codes dedicate`.

    Returns:
        The new table.

    Raises:
        UserError: a file cannot be used, the options choose no token, or the tokenizers differ.
    """
    choice = DedicatedChoice(settings.rows, settings.data, settings.tokens, settings.by_loss, prefix="--")
    if choice.is_empty:
        raise UserError("give --rows F with --data SHARDS or --by-loss RUN, or --tokens FILE")
    choice.check_data_is_read()
    check_code_output(settings.out, (settings.codes, settings.tokens))
    table = dedicate(CodeTable.load(settings.codes), choice)
    table.save(settings.out)
    return table


def dedicate(table: CodeTable, choice: DedicatedChoice) -> CodeTable:
    """Return a table whose chosen tokens are dedicated, beside those that are already.

    Args:
        table: the codes.
        choice: of the tokens.

    Raises:
        UserError: as `choose_tokens`.
    """
    if choice.is_empty:
        return table
    ids, how = choose_tokens(choice, table.num_tokens, table.metadata.get(TOKENIZER))
    return with_dedicated(table, ids, how)


def with_dedicated(table: CodeTable, ids: np.ndarray, how: str) -> CodeTable:
    """Return a table with more dedicated tokens.

    Args:
        table: the codes.
        ids: of tokens.
        how: they were chosen, for the metadata.
    """
    metadata = table.metadata | {"dedicated_by": "; ".join(filter(None, [table.metadata.get("dedicated_by"), how]))}
    own = np.union1d(table.dedicated, ids).astype(np.int32)
    return CodeTable(table.codes, table.table_sizes, metadata, own, unique=table.unique)


def choose_tokens(
    choice: DedicatedChoice, num_tokens: int, tokenizer_fingerprint: str | None
) -> tuple[np.ndarray, str]:
    """Choose the tokens that get a row of their own.

    Args:
        choice: how; not an empty one.
        num_tokens: N.
        tokenizer_fingerprint: of the codes, if it is known.

    Returns:
        (F,) ids in rising order, and in words how they were chosen.

    Raises:
        UserError: a file cannot be used, does not belong to these tokens, or names a token that there is not.
    """
    if choice.tokens is not None:
        ids = read_token_ids(choice.tokens, num_tokens, f"{choice.prefix}tokens")
        return ids, f"list {choice.tokens.name}"
    assert choice.rows is not None
    if choice.rows > num_tokens:
        raise UserError(f"{choice.prefix}rows {choice.rows}: there are only {num_tokens:,} tokens")
    data = choice.data
    if data is None:
        assert choice.by_loss is not None
        if not is_run(choice.by_loss):
            raise UserError(f"{choice.prefix}by-loss {choice.by_loss}: is not a run; give --data SHARDS with a model")
        data = open_run(choice.by_loss).recipe.data
    dataset = ShardDataset.open(data, verify=False)
    theirs = dataset.manifest["tokenizer"]
    if theirs["vocab_size"] != num_tokens or tokenizer_fingerprint not in (None, theirs["fingerprint"]):
        raise UserError(
            f"--data {data}: made with another tokenizer ({theirs['vocab_size']:,} tokens) than the codes "
            f"({num_tokens:,} tokens); give shards of theirs"
        )
    if choice.by_loss is None:
        amount, how = training_frequency(dataset), f"{choice.rows} most frequent of {data.resolve().name}"
    else:
        amount = summed_losses(choice.by_loss, dataset, choice.prefix)
        how = f"{choice.rows} of greatest loss of {choice.by_loss.resolve().name} on {data.resolve().name}"
    chosen = np.argsort(-amount, kind="stable")[: choice.rows]
    absent = int(np.count_nonzero(amount[chosen] == 0))
    get_logger().info(
        f"dedicated rows: {choice.rows:,} tokens hold {amount[chosen].sum() / max(amount.sum(), 1e-30):.1%} of the "
        + ("text" if choice.by_loss is None else "loss")
        + (f"; {absent:,} of them do not occur" if absent else "")
    )
    return np.sort(chosen).astype(np.int32), how


def read_list(path: Path, option: str, entries: str) -> str:
    """Read a file of entries, one per line, as text.

    Args:
        path: the file.
        option: that names it, for messages.
        entries: what they are, for messages.

    Raises:
        UserError: it cannot be read, is too large for such a list, or is not UTF-8.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_FILE + 1)  # of a device or a pipe too, whose size nobody knows
        if len(content) > LARGEST_FILE:
            raise UserError(
                f"{option} {path}: more than {LARGEST_FILE:,} bytes are too many for a list of {entries}; give one per "
                "line"
            )
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: is not UTF-8 (byte {error.start}); give {entries}, one per line") from error


def read_token_ids(path: Path, num_tokens: int, option: str) -> np.ndarray:
    """Read token ids from a file, one per line; empty lines and what follows a # do not count.

    Args:
        path: the file.
        num_tokens: N.
        option: that names the file, for messages.

    Returns:
        (F,) ids in rising order.

    Raises:
        UserError: the file cannot be read or holds no id; or, with its line, no number, one out of range, one twice.
    """
    lines = read_list(path, option, "token ids").splitlines()
    seen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        word = line.split("#")[0].strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit() and len(word) < 10):
            raise UserError(
                f"{option}: {path}:{number}: {word[:40]!r} is not a token id; give one per line, # comments"
            )
        token = int(word)
        if token >= num_tokens:
            raise UserError(f"{option}: {path}:{number}: token {token} is not in 0..{num_tokens - 1}")
        if token in seen:
            raise UserError(f"{option}: {path}:{number}: token {token} stands in line {seen[token]} already")
        seen[token] = number
    if not seen:
        raise UserError(f"{option} {path}: holds no token id; give one per line")
    return np.array(sorted(seen), dtype=np.int32)


def summed_losses(source: Path, dataset: ShardDataset, prefix: str = "--dedicated-") -> np.ndarray:
    """Sum the loss of a model over the held-out text for each token that it has to predict.

    Args:
        source: a run, or a folder of one of our masked language models.
        dataset: shards of its tokenizer.
        prefix: of the option's name, for messages.

    Returns:
        (N,) float64 nats; 0 for tokens that are never predicted.

    Raises:
        UserError: no model, one that predicts no masked tokens or other ones, or no held-out text.
    """
    import torch

    from ksub_ds.model.loading import open_model
    from ksub_ds.model.masked_lm import SubMaskedLM
    from ksub_ds.pretrain.prefetch import to_tensors

    option, share = f"{prefix}by-loss {source}", MASKED_SHARE
    if is_run(source):
        run = open_run(source)
        model, share = run.checkpoint().load_model(), run.recipe.mlm_probability
    else:
        model = open_model(source).float()
    num_tokens = dataset.manifest["tokenizer"]["vocab_size"]
    if not isinstance(model, SubMaskedLM):
        raise UserError(f"{option}: is a {type(model).__name__}; give a masked language model of ours, or a run of one")
    if model.config.vocab_size != num_tokens:
        raise UserError(f"{option}: predicts {model.config.vocab_size:,} tokens, the shards have {num_tokens:,}")
    every = max((dataset.num_sequences("validation", language) for language in dataset.languages), default=0)
    batches = HeldOutBatches(dataset, every, share)
    if not len(batches):
        but = " (pairs of languages do not count)" if dataset.pairs else ""
        raise UserError(f"--data {dataset.folder}: has no held-out part{but}; make it with --validation-fraction 0.01")
    total = torch.zeros(num_tokens, dtype=torch.float64)
    with Progress(len(batches), "batches", "summing the loss of each token") as progress:
        for _, batch in batches:
            labels, losses = model.label_losses(**to_tensors(batch, "cpu"))
            total.index_add_(0, labels, losses)
            progress.advance()
    return total.numpy()

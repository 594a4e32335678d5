"""`ksub codes ...`: make, inspect and extend code files."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse


def positional(
    num_tables: int,
    out: Path,
    num_tokens: int | None = None,
    tokenizer: Path | None = None,
    reserve_special_tokens: bool = False,
    table_size: int | None = None,
    dedicated_rows: int | None = None,
    data: Path | None = None,
    dedicated_tokens: Path | None = None,
    dedicated_by_loss: Path | None = None,
) -> None:
    """Make codes by Algorithm 1: f_k(n) is the k-th digit of n in base M, M the least with M^K >= N.

    Args:
        num_tables: K, how many tables replace the embedding.
        out: The code file to write (.safetensors).
        num_tokens: N, the size of the vocabulary. [the tokenizer's]
        tokenizer: SentencePiece .model or HuggingFace folder; its fingerprint goes into the file.
        reserve_special_tokens: Give <s>, </s>, <pad>, <unk>, <mask> rows of their own in every table.
        table_size: M, more than needed, to leave codes free for tokens that are added later. [the least]
        dedicated_rows: F: give so many tokens a row of their own too, the most frequent of --data.
        data: Shards folder where --dedicated-rows counts tokens.
        dedicated_tokens: In place of --dedicated-rows: a file of token ids, one per line.
        dedicated_by_loss: Run or model: --dedicated-rows takes tokens where its held-out loss is greatest.

    Raises:
        UserError: options that contradict each other, or numbers that give no codes.
    """
    from ksub_ds.codes.positional import MOST_CODES, positional_codes
    from ksub_ds.codes.table import check_code_output
    from ksub_ds.vectors.build import report
    from ksub_ds.vectors.dedicated import DedicatedChoice, dedicate

    choice = DedicatedChoice(dedicated_rows, data, dedicated_tokens, dedicated_by_loss)
    choice.check_data_is_read()
    check_code_output(out, (tokenizer, dedicated_tokens))
    special_ids: tuple[int, ...] = ()
    fingerprint = {}
    if tokenizer is not None:
        from ksub_ds.corpus.tokenizers.loading import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        if num_tokens not in (None, loaded.vocab_size):
            raise UserError(f"--num-tokens {num_tokens}: {tokenizer} has {loaded.vocab_size} tokens; leave one out")
        num_tokens, fingerprint = loaded.vocab_size, {"tokenizer_fingerprint": loaded.fingerprint}
        special_ids = loaded.special_ids if reserve_special_tokens else ()
    elif num_tokens is None:
        raise UserError("give --num-tokens N or --tokenizer PATH")
    elif reserve_special_tokens:
        raise UserError("--reserve-special-tokens: give --tokenizer PATH too, it names the special tokens")
    if num_tokens < 1 or num_tables < 1 or num_tokens * num_tables > MOST_CODES:
        raise UserError(
            f"--num-tokens {num_tokens:,} --num-tables {num_tables:,}: both must be at least 1, and their product at "
            f"most {MOST_CODES:,}"
        )
    try:
        table = positional_codes(num_tokens, num_tables, special_ids, table_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    table.metadata.update(fingerprint)
    table = dedicate(table, choice)
    table.save(out)
    print(report(table, out))


def inspect(path: Positional[Path], embedding_dim: int | None = None) -> None:
    """Check a code file and print what it holds.

    Args:
        path: The code file.
        embedding_dim: d, the width at which parameters are counted. [that of the model whose codes they are, or 512]

    Raises:
        UserError: the file is damaged, or d is smaller than the number of tables.
    """
    from ksub_ds.codes.inspection import describe
    from ksub_ds.codes.table import CodeTable

    table = CodeTable.load(path)
    recorded = table.metadata.get("embedding_dim", "")
    width = int(recorded) if re.fullmatch("[0-9]{1,6}", recorded) else 512
    width = width if embedding_dim is None else embedding_dim
    if width < table.num_tables:
        raise UserError(f"--embedding-dim {width}: must be at least the {table.num_tables} tables of {path}")
    rows = describe(table, width)
    longest = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{longest}}  {value}")


def cluster(arguments: Sequence[str]) -> None:
    """Make codes by Algorithm 2, with the options of vectors/build.py, as preprocessing/build_codes.py does."""
    from ksub_ds.common import distributed
    from ksub_ds.vectors.build import ClusterVectors, build_codes, report

    settings = parse(ClusterVectors, arguments, "ksub codes cluster")
    table = build_codes(settings)
    if distributed.is_main():
        print(report(table, settings.out))


def neighbours(
    path: Positional[Path],
    token: Annotated[Positional[str], arg(metavar="TOKEN")],
    tokenizer: Path,
    count: int = 10,
) -> None:
    """Print the tokens that share the most codes with a token: its leaf first, then by the number of shared codes.

    Args:
        path: The code file.
        token: A token as the vocabulary spells it ("▁water", with the mark of a word start).
        tokenizer: SentencePiece .model or HuggingFace folder that the codes were made for.
        count: How many to print.

    Raises:
        UserError: the codes are not for this tokenizer, or the token is not in it.
    """
    from ksub_ds.codes.inspection import code_neighbours
    from ksub_ds.codes.table import CodeTable
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.corpus.tokenizers.spelling import spellings

    table, loaded = CodeTable.load(path), load_tokenizer(tokenizer)
    theirs = table.metadata.get("tokenizer_fingerprint", loaded.fingerprint)
    if table.num_tokens != loaded.vocab_size or theirs != loaded.fingerprint:
        raise UserError(f"--tokenizer {tokenizer}: {path} was made for another tokenizer; give that one")
    if count < 1:
        raise UserError(f"--count {count}: must be at least 1")
    tokens = loaded.tokens()
    if token not in tokens:
        alike = difflib.get_close_matches(token, [each for each in tokens if each[:2] == token[:2]], n=3)
        marked = [each for each in spellings(token) if each in tokens]
        near = ", ".join(dict.fromkeys([*marked, *alike]))
        raise UserError(f"{token!r} is not a token of {tokenizer}" + (f"; near: {near}" if near else ""))
    own = tokens.index(token)
    width = max(len(f"{code}") for code in table.table_sizes)

    def line(index: int, words: str) -> str:
        codes = " ".join(f"{code:>{width}}" for code in table.codes[index].tolist())
        return f"{codes}  {words:<14}  {index:>7}  {tokens[index]}"

    print(line(own, "the token"))
    for index, shared, same_leaf in code_neighbours(table, own, count):
        print(line(index, "same leaf" if same_leaf else f"{shared} of {table.num_tables} codes"))


def dedicate_tokens(arguments: Sequence[str]) -> None:
    """Give tokens rows of their own, with the options of vectors/dedicated.py."""
    from ksub_ds.vectors.build import report
    from ksub_ds.vectors.dedicated import DedicateCodes, dedicate_code_file

    settings = parse(DedicateCodes, arguments, "ksub codes dedicate")
    print(report(dedicate_code_file(settings), settings.out))


def extend(arguments: Sequence[str]) -> None:
    """Give new tokens unused codes, with the options of vectors/extend.py."""
    from ksub_ds.vectors.build import report
    from ksub_ds.vectors.extend import ExtendCodes, extend_code_file

    settings = parse(ExtendCodes, arguments, "ksub codes extend")
    print(report(extend_code_file(settings), settings.out))

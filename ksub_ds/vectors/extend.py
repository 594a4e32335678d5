"""Add new tokens to a code file: `ksub codes extend`.

    ksub codes extend codes.safetensors --tokens new_tokens.txt --out bigger.safetensors

The tokens take the ids after the last one, in the order of the file. The tables do not grow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ksub_ds.codes.extension import extend_codes
from ksub_ds.codes.table import CodeTable, check_code_output
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes
from ksub_ds.vectors.dedicated import DedicatedChoice, dedicate, read_list
from ksub_ds.vectors.matrix import read_matrix


@dataclass(frozen=True)
class ExtendCodes:
    """Give unused codes to new tokens, whose ids follow the old ones; the codes of the old tokens stay."""

    codes: Annotated[Path, tyro.conf.Positional]
    """The code file to extend."""
    tokens: Path
    """New tokens, UTF-8, one per line, as the enlarged vocabulary will spell them."""
    out: Path
    """The code file to write."""
    vectors: Path | None = None
    """.npy or .safetensors matrix, one row per new token: each goes to the nearest leaf with free codes. Needs
    --embeddings."""
    embeddings: str | None = None
    """Vectors of the old tokens, from the same source: a matrix, model folder or run, as for `ksub codes cluster`."""
    tokenizer: Path | None = None
    """The old tokenizer: a token that it has already is refused."""
    dedicated_tokens: Path | None = None
    """File of token ids, old or new, one per line: these get a row of their own too. [those that have one]"""


def extend_code_file(settings: ExtendCodes) -> CodeTable:
    """Write the extended code file.

    Args:
        settings: the options of `ksub codes extend`.

    Returns:
        The extended table.

    Raises:
        UserError: a file cannot be used, a token is there twice, or there are too few unused codes (with the count).
    """
    read = (settings.codes, settings.tokens, settings.vectors, settings.embeddings, settings.tokenizer)
    check_code_output(settings.out, (*read, settings.dedicated_tokens))
    table = CodeTable.load(settings.codes)
    tokens = read_tokens(settings.tokens)
    if settings.tokenizer is not None:
        _check_new(tokens, settings.tokenizer, table)
    if (settings.vectors is None) != (settings.embeddings is None):
        raise UserError("--vectors and --embeddings: give both (new tokens' vectors, and the old ones') or neither")
    vectors = known = None
    if settings.vectors is not None:
        vectors, known = _vectors(settings, len(tokens), table)
    try:
        extended = extend_codes(table, len(tokens), vectors, known)
    except ValueError as error:
        raise UserError(f"{settings.codes}: {error}") from error
    extended.metadata["added_tokens_sha256"] = sha256_bytes("\n".join(tokens).encode())
    extended = dedicate(extended, DedicatedChoice(tokens=settings.dedicated_tokens))
    extended.save(settings.out)
    return extended


def read_tokens(path: Path) -> list[str]:
    """Read the tokens of a file, one per line.

    Raises:
        UserError: the file cannot be read, or holds no token, an empty line or a token twice.
    """
    lines = read_list(path, "--tokens", "tokens").split("\n")
    tokens = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not tokens:
        raise UserError(f"--tokens {path}: holds no token; give one per line")
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token:
            raise UserError(f"--tokens {path}: line {number} is empty; give one token per line")
        if token in seen:
            raise UserError(f"--tokens {path}: line {number} repeats {token!r} of line {seen[token]}")
        seen[token] = number
    return tokens


def _check_new(tokens: list[str], tokenizer: Path, table: CodeTable) -> None:
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size != table.num_tokens:
        raise UserError(
            f"--tokenizer {tokenizer}: has {loaded.vocab_size:,} tokens, the codes are for {table.num_tokens:,}"
        )
    old = {token: index for index, token in enumerate(loaded.tokens())}
    for token in tokens:
        if token in old:
            raise UserError(f"--tokens: {token!r} is token {old[token]} of {tokenizer} already; leave it out")


def _vectors(settings: ExtendCodes, count: int, table: CodeTable) -> tuple[np.ndarray, np.ndarray]:
    from ksub_ds.vectors.sources import load_vectors

    assert settings.vectors is not None and settings.embeddings is not None
    vectors = read_matrix(settings.vectors)
    known, _ = load_vectors(settings.embeddings)
    if len(vectors) != count:
        raise UserError(f"--vectors {settings.vectors}: {len(vectors):,} rows for {count:,} new tokens")
    if len(known) != table.num_tokens:
        raise UserError(
            f"--embeddings {settings.embeddings}: {len(known):,} vectors for {table.num_tokens:,} old tokens"
        )
    if vectors.shape[1] != known.shape[1]:
        raise UserError(f"--vectors {settings.vectors}: width {vectors.shape[1]}, --embeddings has {known.shape[1]}")
    return vectors, known

"""The code table F: every token n has K codes (f_1(n), ..., f_K(n)), one per sub-embedding table (paper §3.1).

    N  num_tokens    size of the vocabulary
    K  num_tables    how many small tables replace the embedding
    M_k table_sizes  rows of table k; f_k(n) lies in [0, M_k)

The embedding of n is the concatenation of row f_k(n) of table k over k. Uniqueness (the paper's
requirement 1) makes it a different vector for every token. K = 1 with M_1 = N is the plain embedding.

F of the tokens may be dedicated: a row of d numbers, which no other token has, is added to what the tables give them.

A table that is only read at the input, by a model that predicts no tokens, may give several tokens the same code
(`unique=False`): codes are then free to be what product quantisation finds.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ksub_ds.codes.packing import code_bits, pack, unpack
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, canonical_safetensors, check_place, sha256_bytes

FORMAT = "ksub-codes-1"
FORMAT_DEDICATED = "ksub-codes-2"  # has the tensor `dedicated` too
FORMAT_INPUT = "ksub-codes-3"  # codes may repeat; packed in as few bits as hold them; `dedicated` may be there
FORMATS = (FORMAT, FORMAT_DEDICATED, FORMAT_INPUT)


def check_code_output(out: Path, read: Iterable[str | Path | None]) -> None:
    """Check, before long work, that a code file may be written: nothing but another one is replaced.

    Args:
        out: the file, of --out.
        read: what the command reads; None and names that are no path do no harm.

    Raises:
        UserError: a folder, another file, or one that is read is there; or nothing can be written there.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out / 'codes.safetensors'}")
    if any(each is not None and Path(each).exists() and out.exists() and out.samefile(each) for each in read):
        raise UserError(f"--out {out}: is read, and would be replaced; name another file")
    if out.exists() and not _is_code_file(out):
        raise UserError(f"--out {out}: is there, and is no code file; name another file")
    check_place(out)


def _is_code_file(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stream:
            return (stream.metadata() or {}).get("format") in FORMATS
    except (OSError, SafetensorError):
        return False


def table_widths(embedding_dim: int, num_tables: int) -> tuple[int, ...]:
    """Split d into the widths d_k of the K tables: the first d mod K are one wider (512 over 3: 171, 171, 170).

    Raises:
        ValueError: more tables than columns, or none.
    """
    if not 1 <= num_tables <= embedding_dim:
        raise ValueError(f"num_tables must lie in 1..embedding_dim = {embedding_dim}, not {num_tables}")
    width, wider = divmod(embedding_dim, num_tables)
    return tuple(width + (k < wider) for k in range(num_tables))


class CodeTable:
    """The codes of every token, with the sizes of the tables they point into.

    Args:
        codes: (N, K) integers.
        table_sizes: the K numbers M_k.
        metadata: strings about the origin (algorithm, seed, tokenizer fingerprint), saved with the codes.
        dedicated: ids of the F tokens that have a row of their own beside the shared ones, in rising order. [none]
        unique: no two tokens may share a whole code, which every decoder needs.

    Raises:
        ValueError: shapes or types that do not fit, or ids that are not tokens. `verify` checks the codes' range and
            uniqueness.
    """

    def __init__(
        self,
        codes: object,
        table_sizes: Sequence[int],
        metadata: Mapping[str, str] | None = None,
        dedicated: object = None,
        unique: bool = True,
    ):
        array = np.asarray(codes)
        sizes = tuple(int(size) for size in table_sizes)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"codes must be a non-empty (N, K) array, not of shape {array.shape}")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"codes must be integers, not {array.dtype}")
        if len(sizes) != array.shape[1] or min(sizes) < 1:
            raise ValueError(f"table_sizes must be {array.shape[1]} positive integers, not {sizes}")
        if array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
            raise ValueError("codes do not fit 32 bits")
        self.codes = np.ascontiguousarray(array, dtype=np.int32)
        if self.codes is array:
            self.codes = self.codes.copy()
        self.codes.flags.writeable = False
        self.table_sizes = sizes
        self.metadata = dict(metadata or {})
        self.unique = unique
        self.dedicated = _token_ids(() if dedicated is None else dedicated, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """The number of tokens, N."""
        return self.codes.shape[0]

    @property
    def num_tables(self) -> int:
        """The number of tables, K."""
        return self.codes.shape[1]

    @property
    def num_dedicated(self) -> int:
        """The number of tokens with a row of their own, F."""
        return len(self.dedicated)

    @property
    def sha256(self) -> str:
        """Fingerprint of codes, table sizes and dedicated tokens: equal if and only if two tables are the same map."""
        header = repr((self.codes.shape, self.table_sizes)).encode()
        codes = header + self.codes.astype("<i4").tobytes()
        return sha256_bytes(codes + self.dedicated.astype("<i4").tobytes())

    @property
    def stored_bits(self) -> int:
        """The bits of a code as it is stored: as few as hold it where codes may repeat, up to 8; else 32."""
        return 32 if self.unique else code_bits(max(self.table_sizes))

    @property
    def stored_codes(self) -> np.ndarray:
        """The codes as they are stored: (N, K) int32, or packed into (N, bytes) uint8 (`packing.py`)."""
        if self.stored_bits == 32:
            return self.codes
        self.verify()
        return pack(self.codes, self.stored_bits)

    def num_parameters(self, embedding_dim: int) -> int:
        """Count the parameters at width d: sum over k of M_k * d_k, and F * d of the dedicated rows."""
        widths = table_widths(embedding_dim, self.num_tables)
        shared = sum(size * width for size, width in zip(self.table_sizes, widths, strict=True))
        return shared + self.num_dedicated * embedding_dim

    def stored_bytes(self, embedding_dim: int, itemsize: int = 4, mixing_numbers: int = 0) -> int:
        """Count the bytes of an embedding as a model file stores it: tables, dedicated rows, codes, the mixing matrix.

        Args:
            embedding_dim: d.
            itemsize: bytes of a number.
            mixing_numbers: of the matrix beside the tables, 0 without one.
        """
        numbers = self.num_parameters(embedding_dim) + mixing_numbers
        return self.stored_codes.nbytes + self.dedicated.nbytes + itemsize * numbers

    def _equal_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens sorted by their codes, and the positions in this order whose code equals the next one's."""
        order = np.lexsort(self.codes.T[::-1])
        sorted_codes = self.codes[order]
        return order, np.flatnonzero((sorted_codes[1:] == sorted_codes[:-1]).all(axis=1))

    def count_collisions(self) -> int:
        """Count the tokens that share their whole code with an earlier one."""
        return len(self._equal_pairs()[1])

    def verify(self) -> None:
        """Check that every code is in range and, where codes must be unique, no two tokens share a whole code.

        Raises:
            ValueError: a code is out of range or not unique; the message names the first such token.
        """
        wrong = (self.codes < 0) | (self.codes >= np.array(self.table_sizes))
        if wrong.any():
            token, k = (int(i) for i in np.argwhere(wrong)[0])
            code = int(self.codes[token, k])
            raise ValueError(
                f"code out of range: token {token} has code {code} in table {k} of {self.table_sizes[k]} rows"
            )
        if not self.unique:
            return
        order, equal = self._equal_pairs()
        if len(equal):
            first, second = sorted(int(token) for token in order[equal[0] : equal[0] + 2])
            raise ValueError(
                f"codes not unique: tokens {first} and {second} share code {tuple(self.codes[first].tolist())} "
                f"({len(equal)} collisions in all)"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: tensor `codes`, `dedicated` if any, metadata with sizes and sha256.

        Raises:
            ValueError: a code is out of range or not unique.
            UserError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save

        self.verify()
        tensors = {"codes": self.stored_codes} | ({"dedicated": self.dedicated} if self.num_dedicated else {})
        metadata = self.metadata | {
            "format": FORMAT_INPUT if not self.unique else FORMAT_DEDICATED if self.num_dedicated else FORMAT,
            "table_sizes": ",".join(map(str, self.table_sizes)),
            "sha256": self.sha256,
        }
        try:
            with atomic_path(Path(path).absolute()) as temporary:
                temporary.write_bytes(canonical_safetensors(save(tensors, metadata=metadata)))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}); choose another place") from error

    @classmethod
    def load(cls, path: str | Path) -> "CodeTable":
        """Read and check a file written by `save`.

        Raises:
            UserError: the file is missing or damaged, or its codes are out of range or not unique.
        """
        from safetensors import SafetensorError, safe_open

        if Path(path).is_dir():
            inside = Path(path) / "codes.safetensors"
            raise UserError(f"{path}: is a folder; give {inside if inside.is_file() else 'a file of `ksub codes`'}")
        if Path(path).is_fifo():  # safetensors would wait for a writer
            raise UserError(f"{path}: not a readable code file (a pipe); give a file of `ksub codes`")
        try:
            with safe_open(path, framework="np") as stream:
                metadata = stream.metadata() or {}
                codes = stream.get_tensor("codes")
                form, names = metadata.get("format"), list(stream.keys())
                has_dedicated = form == FORMAT_DEDICATED or (form == FORMAT_INPUT and "dedicated" in names)
                dedicated = stream.get_tensor("dedicated") if has_dedicated else None
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such code file; make one with `ksub codes positional`") from error
        except (SafetensorError, OSError, TypeError, AttributeError) as error:  # numpy has no bfloat16, no float8
            raise UserError(f"{path}: not a readable code file ({error}); make it again with `ksub codes`") from error
        if form not in FORMATS:
            raise UserError(
                f"{path}: format is {form!r}, not {FORMAT!r}, {FORMAT_DEDICATED!r} or {FORMAT_INPUT!r}; "
                "make it again with `ksub codes`"
            )
        again = "`ksub compress --input-only`" if form == FORMAT_INPUT else "`ksub codes`"
        origin = {key: value for key, value in metadata.items() if key not in ("format", "table_sizes", "sha256")}
        try:
            sizes = [int(size) for size in metadata["table_sizes"].split(",")]
            if form == FORMAT_INPUT and (bits := code_bits(max(sizes))) < 32:
                codes = unpack(codes, len(sizes), bits)
            table = cls(codes, sizes, origin, dedicated, unique=form != FORMAT_INPUT)
            table.verify()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: {error}; the file is damaged or of an earlier form, make it again with {again}"
            ) from error
        if table.sha256 != metadata.get("sha256"):
            raise UserError(f"{path}: codes do not match their sha256; the file is damaged, make it again with {again}")
        return table

    def __repr__(self) -> str:
        dedicated = f", num_dedicated={self.num_dedicated}" if self.num_dedicated else ""
        shared = "" if self.unique else ", unique=False"
        return f"CodeTable(num_tokens={self.num_tokens}, table_sizes={self.table_sizes}{dedicated}{shared})"


def _token_ids(ids: object, num_tokens: int) -> np.ndarray:
    """Return the ids of dedicated tokens as an int32 array that cannot be written.

    Raises:
        ValueError: they are not a list of distinct ids in rising order, in [0, N).
    """
    given = np.asarray(ids)
    if given.ndim != 1 or not (np.issubdtype(given.dtype, np.integer) or not given.size):
        raise ValueError(f"dedicated must be a list of token ids, not of shape {given.shape} and type {given.dtype}")
    outside = given[(given < 0) | (given >= num_tokens)]
    if outside.size:
        raise ValueError(f"dedicated token {int(outside[0])} is not in [0, {num_tokens})")
    falling = np.flatnonzero(given[1:] <= given[:-1])
    if falling.size:
        first, second = (int(token) for token in given[falling[0] : falling[0] + 2])
        raise ValueError(f"dedicated tokens must be distinct and in rising order, but {second} follows {first}")
    array = np.array(given, dtype=np.int32)
    array.flags.writeable = False
    return array


def reserve_special_tokens(ordinary: CodeTable, special_ids: Iterable[int]) -> CodeTable:
    """Give each special token a row of its own in every table, and the other ids the codes of the ordinary tokens.

    The paper suspects that accuracy suffers where `<s>`, `</s>`, `<pad>` and `<mask>` share rows with words.
    S special tokens cost S rows per table.

    Args:
        ordinary: codes of the N - S ordinary tokens, in the order of their ids.
        special_ids: S distinct ids in [0, N).

    Returns:
        Codes of all N tokens.

    Raises:
        ValueError: a special id outside [0, N).
    """
    special = np.array(sorted(set(special_ids)), dtype=np.int64)
    num_tokens = ordinary.num_tokens + len(special)
    if len(special) and not (special[0] >= 0 and special[-1] < num_tokens):
        raise ValueError(f"special ids {special.tolist()} must lie in [0, {num_tokens})")
    codes = np.empty((num_tokens, ordinary.num_tables), dtype=np.int64)
    is_special = np.zeros(num_tokens, dtype=bool)
    is_special[special] = True
    codes[~is_special] = ordinary.codes
    codes[special] = np.array(ordinary.table_sizes) + np.arange(len(special))[:, None]
    sizes = [size + len(special) for size in ordinary.table_sizes]
    metadata = ordinary.metadata | {"special_ids": ",".join(map(str, special.tolist()))}
    return CodeTable(codes, sizes, metadata, np.flatnonzero(~is_special)[ordinary.dedicated])

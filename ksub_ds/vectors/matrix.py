"""Read numbers from files: a .npy or .safetensors matrix, and tensors by name from safetensors files.

Nothing is unpickled: .npy files with objects and .bin or .pt checkpoints are refused.
"""

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ksub_ds.codes.blocks import LARGEST_NUMBER
from ksub_ds.codes.table import FORMATS
from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import refuse_stand_in
from ksub_ds.common.logging import get_logger

# Names of the input embedding, the part after the last module prefix; the first that fits wins.
EMBEDDING_NAMES = (
    "word_embeddings.weight",  # BERT, RoBERTa, XLM-R, BLOOM
    "embed_tokens.weight",  # BART, mBART, Llama
    "wte.weight",  # GPT-2
    "embed_in.weight",  # GPT-NeoX
    "tok_embeddings.weight",  # ModernBERT
    "shared.weight",  # T5
    "word_embedding.weight",  # XLNet
    "embeddings.weight",  # XLM and others
)


class TensorFiles:
    """Tensors by name from safetensors files.

    Attributes:
        files: their paths.
        hold_codes: whether one of them is a code file.
        shapes: of the tensors, by name.

    Raises:
        UserError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, files: Sequence[Path]):
        from safetensors import SafetensorError, safe_open

        self.files = list(files)
        self.hold_codes = False
        self._home: dict[str, Any] = {}
        for path in self.files:
            try:
                stream = safe_open(path, framework="pt")  # numpy knows no bfloat16
            except FileNotFoundError as error:
                raise UserError(f"{path}: no such file") from error
            except (SafetensorError, OSError) as error:
                refuse_stand_in(path)
                raise UserError(f"{path}: not a readable safetensors file ({error}); fetch or save it anew") from error
            self.hold_codes |= (stream.metadata() or {}).get("format") in FORMATS
            self._home.update(dict.fromkeys(stream.keys(), stream))
        self.shapes = {name: tuple(home.get_slice(name).get_shape()) for name, home in self._home.items()}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor; floating point as float32."""
        tensor = self._home[name].get_tensor(name)
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def embedding_name(self, asked: str | None = None) -> str:
        """The name of the input embedding: the only tensor, or one of EMBEDDING_NAMES, least deep first.

        An encoder's comes before a decoder's; where there are both, a line says which is taken.

        Args:
            asked: take the tensor of this name instead.

        Raises:
            UserError: none fits, or there is none of the name asked for.
        """
        if asked is not None:
            if asked not in self.shapes:
                matrices = sorted(name for name, shape in self.shapes.items() if len(shape) == 2)
                near = [name for name in matrices if name.endswith(EMBEDDING_NAMES)] or matrices
                raise UserError(f"--tensor {asked}: {self.files[0]} has no such tensor; it has {', '.join(near[:5])}")
            return asked
        if len(self.shapes) == 1:
            return next(iter(self.shapes))
        for ending in EMBEDDING_NAMES:
            found = [
                name
                for name, shape in self.shapes.items()
                if (name == ending or name.endswith("." + ending)) and len(shape) == 2
            ]
            if found:
                best, *others = sorted(found, key=lambda name: ("decoder" in name.split("."), name.count("."), name))
                if others:
                    get_logger().info(
                        f"{self.files[0]}: takes the vectors of {best}, not of {', '.join(others)}; --tensor NAME "
                        "takes others"
                    )
                return best
        raise UserError(
            f"{self.files[0]}: no input embedding among its {len(self.shapes)} tensors "
            "(no ...word_embeddings.weight or the like); save the matrix alone, as .npy or .safetensors"
        )


def read_matrix(path: Path, tensor: str | None = None) -> np.ndarray:
    """Read a matrix from a .npy or .safetensors file.

    Args:
        path: the file.
        tensor: the name of one in a .safetensors file. [its only one, or the input embedding]

    Returns:
        (N, p) float32, all finite.

    Raises:
        UserError: pickled objects, a damaged file, wrong shape or type, NaN or infinity (naming the row).
    """
    if path.suffix == ".safetensors":
        files = TensorFiles([path])
        if files.hold_codes:
            raise UserError(f"{path}: is a code file, which holds no vectors; give a model folder, or a matrix")
        return check_matrix(files.read(files.embedding_name(tensor)), str(path))
    if tensor is not None:
        raise UserError(f"--tensor {tensor}: {path} is not a .safetensors file, and only those name their tensors")
    if path.suffix != ".npy":
        pickled = path.suffix in (".bin", ".pt", ".pth", ".pkl")
        why = "pickled files are not read" if pickled else "not a file of vectors"
        raise UserError(f"{path}: {why}; give a .npy or .safetensors matrix, a model folder or a shards folder")
    try:
        return check_matrix(np.load(path, mmap_mode="r", allow_pickle=False), str(path))
    except UserError:
        raise
    except (ValueError, OSError, EOFError, OverflowError, TypeError, RecursionError, TokenError, BadZipFile) as error:
        unknown = "pickled" in str(error)  # numpy says so of all that does not begin as its own files
        if "Python objects" in str(error) or "Object arrays" in str(error) or (unknown and _is_pickle(path)):
            raise UserError(
                f"{path}: holds pickled objects, which are not read; save numbers: np.save(path, array.astype('f4'))"
            ) from error
        about = "it does not begin as such files do" if unknown else one_line(error)
        raise UserError(f"{path}: not a readable .npy file ({about}); save it anew") from error


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(1) == b"\x80"


def check_matrix(matrix: np.ndarray, name: str) -> np.ndarray:
    """Check a matrix and return it as C-ordered float32.

    Args:
        matrix: (N, p) numbers of any kind.
        name: where it comes from, for errors.

    Raises:
        UserError: not (N, p) numbers, or a row that is not finite.
    """
    if not isinstance(matrix, np.ndarray):
        raise UserError(f"{name}: holds several arrays; save the matrix alone: np.save(path, matrix)")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"{name}: has shape {matrix.shape}; one row per token is needed, (N, p)")
    if not (np.issubdtype(matrix.dtype, np.floating) or np.issubdtype(matrix.dtype, np.integer)):
        raise UserError(f"{name}: holds {matrix.dtype}; real numbers are needed")
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(matrix, dtype=np.float32)
    for first in range(0, len(result), 1 << 14):
        block = result[first : first + (1 << 14)]
        bad = np.flatnonzero(~(np.abs(block) <= LARGEST_NUMBER).all(axis=1))
        if len(bad):
            given = matrix[first + int(bad[0])]
            what = "NaN or infinity" if not np.isfinite(given).all() else f"a number beyond {LARGEST_NUMBER:g}"
            raise UserError(f"{name}: row {first + int(bad[0])} holds {what}; repair the vector of that token")
    return result

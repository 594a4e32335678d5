"""Read the embeddings of one of our own models, from a run's newest whole checkpoint or an exported folder.

A plain model (K = 1) has them as its one table; in a sub-embedding model they are composed from codes and tables, and
of dedicated tokens the rows of their own are added.
"""

from pathlib import Path

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.vectors.hf_folder import in_folder, safetensors_in, weight_files
from ksub_ds.vectors.matrix import TensorFiles, check_matrix

LAYERS = ("word_embeddings.", "tok_embeddings.", "embed_tokens.", "wte.")


def run_vectors(run: Path) -> tuple[np.ndarray, str]:
    """Read the embeddings of a run's newest whole checkpoint.

    Returns:
        (N, d) float32, and the name of the checkpoint.

    Raises:
        UserError: not a run folder, no whole checkpoint, or one of other codes than the run's.
    """
    checkpoint = open_run(run).checkpoint()
    checkpoint.check_codes()
    name = str(checkpoint.path)
    table = checkpoint.run.table
    matrix = _compose(TensorFiles([checkpoint.weights]), table.codes, table.dedicated, name)
    return check_matrix(matrix, name), checkpoint.path.name


def is_export(folder: Path) -> bool:
    """Return whether a folder holds one of our models in HuggingFace's form."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and str(config.get("model_type")).startswith("ksub_")


def export_vectors(folder: Path) -> np.ndarray:
    """Read the embeddings of an exported model.

    Returns:
        (N, d) float32.

    Raises:
        UserError: no weights, or no codes and tables among them.
    """

    def wanted(key: str) -> bool:
        return any(layer in key for layer in LAYERS)

    files = weight_files(in_folder(folder), str(folder), wanted, safetensors_in(folder))
    codes = [name for name in files.shapes if name.endswith(tuple(layer + "codes" for layer in LAYERS))]
    if not codes:
        raise UserError(f"{folder}: no codes among the weights; export the run again")
    own = [name for name in files.shapes if name.endswith(tuple(layer + "dedicated" for layer in LAYERS))]
    dedicated = files.read(own[0]) if own else np.zeros(0, dtype=np.int64)
    return check_matrix(_compose(files, files.read(codes[0]), dedicated, str(folder)), str(folder))


def _compose(files: TensorFiles, codes: np.ndarray, dedicated: np.ndarray, name: str) -> np.ndarray:
    """Compose embeddings: row n joins row codes[n, k] of every table k, through the matrix A if there is one.

    Of the dedicated tokens the rows of their own are added.

    Raises:
        UserError: a table is missing, or shorter than the codes that point into it; or the dedicated rows are.
    """

    def find(end: str) -> list[str]:
        return [key for key in files.shapes if key.endswith(tuple(layer + end for layer in LAYERS))]

    tables = []
    for k, column in enumerate(codes.T):
        found = find(f"tables.{k}")
        if not found or files.shapes[found[0]][0] <= column.max() or column.min() < 0:
            raise UserError(f"{name}: table {k} is missing, or shorter than the codes that point into it")
        tables.append(files.read(found[0])[column])
    rows = np.concatenate(tables, axis=1)
    mixing = find("mixing")
    rows = rows @ files.read(mixing[0]).T if mixing else rows
    if len(dedicated):
        own = find("dedicated_rows")
        if not own or files.shapes[own[0]] != (len(dedicated), rows.shape[1]):
            raise UserError(f"{name}: the {len(dedicated):,} dedicated rows are missing, or of another size")
        rows[dedicated] += files.read(own[0])
    return rows

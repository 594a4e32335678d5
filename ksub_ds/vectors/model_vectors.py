"""Read the input embeddings of a model from safetensors, without building it: any of HuggingFace's, or one of ours.

A plain model of ours (K = 1) has them as its one table; in a sub-embedding model they are composed from codes and
tables, and of dedicated tokens the rows of their own are added.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.tokenizers.location import TOKENIZER_FILES
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.vectors.matrix import EMBEDDING_NAMES, TensorFiles, check_matrix

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MODEL_FILE = re.compile(r"(?P<stem>(?:pytorch_)?model(?:\.\w+)?)(?:-\d{5}-of-(?P<total>\d{5}))?\.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LAYERS = ("word_embeddings.", "tok_embeddings.", "embed_tokens.", "wte.")  # ours, whose codes and tables they hold

Fetch = Callable[[str], Path | None]


def folder_vectors(folder: Path, tensor: str | None = None) -> np.ndarray:
    """Read the input embeddings of a model folder; one of ours has them in codes and tables.

    Args:
        folder: of the model.
        tensor: the name of a tensor to read instead.

    Returns:
        (N, p) float32.

    Raises:
        UserError: no safetensors weights, or no embedding among them.
    """
    if tensor is None and _is_export(folder):
        return export_vectors(folder)
    return check_matrix(_embedding(_in_folder(folder), str(folder), tensor, _safetensors_in(folder)), str(folder))


def _in_folder(folder: Path) -> Fetch:
    """Return a function that finds a file of a folder by name, or gives None."""

    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return fetch


def _safetensors_in(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a folder."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())


def _weight_files(fetch: Fetch, name: str, wanted: Callable[[str], bool], others: Sequence[str] = ()) -> TensorFiles:
    """Open the safetensors files of a model that hold certain tensors.

    Args:
        fetch: finds a file of the model by name.
        name: of the model, for errors.
        wanted: whether a tensor of this name is needed; not asked for a model of one file.
        others: names of safetensors files to open where there are neither model.safetensors nor its index: all shards,
            or the one variant (model.fp16.safetensors).

    Raises:
        UserError: there are no such files.
    """
    index = fetch(INDEX)
    if index is not None:
        about = read_json(index)
        places = about.get("weight_map") if isinstance(about, dict) else None
        if not isinstance(places, dict):
            raise UserError(f"{index}: has no weight_map; fetch the model anew")
        files = sorted({str(place) for key, place in places.items() if wanted(key)})
        if any(Path(file).name != file for file in files):
            raise UserError(f"{index}: names a file outside its folder; fetch the model anew")
        paths = [(file, fetch(file)) for file in files]
        for file, path in paths:
            if path is None:
                raise UserError(f"{name}: {file}, which {INDEX} names, is missing; fetch the model anew")
        if paths:
            return TensorFiles([path for _, path in paths if path is not None])
        raise UserError(f"{name}: {INDEX} names no input embedding; save the matrix alone, as .npy or .safetensors")
    weights = fetch(WEIGHTS)
    if weights is None and others:
        chosen = _without_index(others, name)
        get_logger().info(f"{name}: no {WEIGHTS} and no index; opens {', '.join(chosen)}")
        return TensorFiles([path for path in map(fetch, chosen) if path is not None])
    if weights is None:
        pickled = [file for file in PICKLED if fetch(file) is not None]
        if pickled:
            raise UserError(
                f"{name}: holds only {pickled[0]}, a pickled file, which is not read; load it with transformers in a "
                "place you trust and save_pretrained() it as safetensors"
            )
        raise UserError(f"{name}: holds no {WEIGHTS}; give a model folder, a shards folder or a .npy matrix")
    return TensorFiles([weights])


def _without_index(files: Sequence[str], name: str) -> list[str]:
    """Return the files of the one model among safetensors files: all its shards, or its only file.

    Raises:
        UserError: a shard is missing, there are several models, or files of other names only.
    """
    models: dict[str, list[str]] = {}  # by the name of the whole file and the number of shards
    for file in files:
        if match := _MODEL_FILE.fullmatch(file):
            models.setdefault(f"{match['stem']}-of-{match['total']}", []).append(file)
    if not models:
        raise UserError(f"{name}: holds no {WEIGHTS}, only {', '.join(files[:5])}; give the file itself")
    if len(models) > 1:
        raise UserError(f"{name}: holds several models ({', '.join(files[:5])}); leave one, or give the file itself")
    (key, found), *_ = models.items()
    stem, _, total = key.rpartition("-of-")
    if total != "None":
        wanted = [f"{stem}-{number:05}-of-{total}.safetensors" for number in range(1, min(int(total), 9999) + 1)]
        missing = [file for file in wanted if file not in found]
        if missing:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise UserError(
                f"{name}: holds {', '.join(found[:3])} of {int(total):,} shards; {', '.join(missing[:3])}{more} "
                "is missing; fetch the model anew"
            )
    return found


def _embedding(fetch: Fetch, name: str, tensor: str | None, others: Sequence[str] = ()) -> np.ndarray:
    def wanted(key: str) -> bool:
        return key.endswith(EMBEDDING_NAMES) if tensor is None else key == tensor

    files = _weight_files(fetch, name, wanted, others)
    return files.read(files.embedding_name(tensor))


def hub_vectors(name: str, tensor: str | None = None) -> tuple[np.ndarray, Path | None]:
    """Read the input embeddings of a model by its Hub name.

    The local cache is asked first, the network only for what is not there, and never under HF_HUB_OFFLINE=1.

    Args:
        name: of the model.
        tensor: the name of a tensor to read instead.

    Returns:
        (N, p) float32, and the folder of its tokenizer files, if it has any.

    Raises:
        UserError: no such model, no network, or no safetensors weights.
    """
    fetch = _from_hub(name)
    matrix = check_matrix(_embedding(fetch, name, tensor), name)
    tokenizer = [path for path in map(fetch, TOKENIZER_FILES) if path is not None]
    return matrix, tokenizer[0].parent if tokenizer else None


def _from_hub(name: str) -> Fetch:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    known = any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", WEIGHTS, INDEX))

    def fetch(file: str) -> Path | None:
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            return Path(cached)
        if constants.HF_HUB_OFFLINE:
            if known:
                return None
            raise UserError(f"{name}: no such file or folder, and no model of that name in the local HuggingFace cache")
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it means: no connection
            if known:
                return None
            raise UserError(
                f"{name}: no such file or folder, and the HuggingFace Hub cannot be reached; download the model first"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"{name}: no such file or folder, nor a model on the HuggingFace Hub ({reason})") from error

    return fetch


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


def _is_export(folder: Path) -> bool:
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

    files = _weight_files(_in_folder(folder), str(folder), wanted, _safetensors_in(folder))
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
        UserError: codes that are none; a table is missing, or shorter than the codes that point into it; the same of
            the dedicated rows; a mixing matrix of another size.
    """
    for what, ids, dimensions in (("codes", codes, 2), ("dedicated tokens", dedicated, 1)):
        if ids.ndim != dimensions or not np.issubdtype(ids.dtype, np.integer) or (dimensions == 2 and not ids.size):
            raise UserError(f"{name}: its {what} are of shape {ids.shape} and type {ids.dtype}; the file is damaged")
    if len(dedicated) and not 0 <= dedicated.min() <= dedicated.max() < len(codes):
        raise UserError(f"{name}: its dedicated tokens are not in [0, {len(codes):,}); the file is damaged")

    def find(end: str) -> list[str]:
        return [key for key in files.shapes if key.endswith(tuple(layer + end for layer in LAYERS))]

    tables = []
    for k, column in enumerate(codes.T):
        found = find(f"tables.{k}")
        shape = files.shapes[found[0]] if found else ()
        if len(shape) != 2 or shape[0] <= column.max() or column.min() < 0:
            raise UserError(f"{name}: table {k} is missing, or shorter than the codes that point into it")
        tables.append(files.read(found[0])[column])
    rows = np.concatenate(tables, axis=1)
    mixing = find("mixing")
    if mixing and files.shapes[mixing[0]] != (rows.shape[1],) * 2:
        raise UserError(f"{name}: its mixing matrix is of shape {files.shapes[mixing[0]]}; the file is damaged")
    rows = rows @ files.read(mixing[0]).T if mixing else rows
    if len(dedicated):
        own = find("dedicated_rows")
        if not own or files.shapes[own[0]] != (len(dedicated), rows.shape[1]):
            raise UserError(f"{name}: the {len(dedicated):,} dedicated rows are missing, or of another size")
        rows[dedicated] += files.read(own[0])
    return rows

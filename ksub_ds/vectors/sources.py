"""Read the vectors to cluster from whatever `--embeddings X` names.

X                                         the vectors
a .npy or .safetensors file               the matrix in it (of a model file: its input embedding)
a shards folder                           co-occurrence statistics of its text
a run folder of `ksub pretrain`           the embeddings it has learnt so far
an exported model, or any HF folder       its input embeddings
a name, if there is no such path          the same, of a model on the HuggingFace Hub
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import ShardDataset, is_shards
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.corpus.tokenizers.location import is_hub_name
from ksub_ds.pretrain.open_run import is_run
from ksub_ds.vectors.matrix import read_matrix
from ksub_ds.vectors.model_vectors import folder_vectors, hub_vectors, run_vectors


@dataclass(frozen=True)
class Description:
    """What a matrix of vectors is.

    Attributes:
        source: where it comes from, as text.
        sha256: of the vectors.
        tokenizer: its ids are the row numbers; None if it is not known.
    """

    source: str
    sha256: str
    tokenizer: Tokenizer | None

    def metadata(self) -> dict[str, str]:
        """Return the description as metadata of a code file."""
        found = {"vectors": self.source, "vectors_sha256": self.sha256}
        if self.tokenizer is not None:
            found["tokenizer_fingerprint"] = self.tokenizer.fingerprint
        return found


def load_vectors(
    source: str | Path, tokenizer: str | Path | None = None, seed: int = 0, tensor: str | None = None
) -> tuple[np.ndarray, Description]:
    """Read the vectors to cluster, one per token.

    Args:
        source: X of the table above.
        tokenizer: SentencePiece .model or HuggingFace folder. [the one that lies with the source, if any]
        seed: of the co-occurrence vectors.
        tensor: the name of a tensor in safetensors files. [the input embedding]

    Returns:
        (N, p) float32, all finite, and their description.

    Raises:
        UserError: the source cannot be read, or its rows are not the tokenizer's tokens.
    """
    matrix, words, beside = _read(source, tokenizer, seed, tensor)
    if tensor is not None:
        words += f", tensor {tensor}"
    loaded = _open_tokenizer(source, tokenizer, beside)
    if loaded is not None and loaded.vocab_size != len(matrix):
        if beside is None or len(matrix) < loaded.vocab_size:
            raise UserError(
                f"{source}: {len(matrix):,} vectors, but the tokenizer {tokenizer or beside} has "
                f"{loaded.vocab_size:,} tokens; give the tokenizer of these vectors"
            )
        get_logger().info(f"{source}: {len(matrix) - loaded.vocab_size:,} rows beyond the vocabulary left out")
        matrix = matrix[: loaded.vocab_size]
    return matrix, Description(words, sha256_bytes(matrix), loaded)


def _read(
    source: str | Path, tokenizer: str | Path | None, seed: int, tensor: str | None
) -> tuple[np.ndarray, str, Path | None]:
    """Return the matrix, its source as text, and the tokenizer that lies beside it.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return read_matrix(path, tensor), f"matrix {path.name}", None
    if path.is_dir():
        return _read_folder(path, tokenizer, seed, tensor)
    if not is_hub_name(str(source)):
        raise UserError(
            f"{source}: " + ("is neither a file nor a folder" if path.exists() else "no such file or folder")
        )
    matrix, beside = hub_vectors(str(source), tensor)
    return matrix, f"input embeddings of {source}", beside


def _read_folder(
    path: Path, tokenizer: str | Path | None, seed: int, tensor: str | None
) -> tuple[np.ndarray, str, Path | None]:
    name = path.resolve().name
    if tensor is not None:
        return folder_vectors(path, tensor), f"model {name}", path
    if is_shards(path):
        return *_shards(path, tokenizer, seed), path / "tokenizer"
    if is_run(path):
        matrix, checkpoint = run_vectors(path)
        return matrix, f"embeddings of run {name}, {checkpoint}", path / "tokenizer"
    if (path / "config.json").is_file():
        return folder_vectors(path), f"input embeddings of model {name}", path
    raise UserError(
        f"{path}: neither a shards folder (manifest.json), a run (recipe.json) nor a model (config.json); "
        "give one of these, or a .npy or .safetensors matrix"
    )


def _shards(path: Path, tokenizer: str | Path | None, seed: int) -> tuple[np.ndarray, str]:
    from ksub_ds.vectors.cooccurrence import Cooccurrence, shard_vectors

    dataset = ShardDataset.open(path)
    if tokenizer is not None:
        dataset.check_tokenizer(load_tokenizer(tokenizer).fingerprint, str(tokenizer))
    matrix = shard_vectors(dataset, Cooccurrence(seed=seed))
    return matrix, f"co-occurrence in shards {dataset.fingerprint[:16]}, seed {seed}"


def _open_tokenizer(source: str | Path, given: str | Path | None, beside: Path | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given)
    if beside is None:
        return None
    try:
        return load_tokenizer(beside)
    except UserError as error:
        get_logger().warning(f"warning: {source} has no usable tokenizer ({error}); the codes will not name one")
        return None

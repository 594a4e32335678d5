"""Matrices from .npy and .safetensors files, and what is refused."""

import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksub_ds import positional_codes
from ksub_ds.common.errors import UserError
from ksub_ds.vectors.matrix import read_matrix
from ksub_ds.vectors.sources import load_vectors

VECTORS = np.random.default_rng(0).standard_normal((40, 6))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_round_trip(tmp_path, dtype, order):
    path = tmp_path / "vectors.npy"
    stored = np.asarray(VECTORS, dtype=dtype, order=order)
    np.save(path, stored)
    matrix = read_matrix(path)
    assert matrix.dtype == np.float32 and matrix.flags.c_contiguous
    np.testing.assert_array_equal(matrix, stored.astype("f4"))


def test_safetensors_round_trip_whatever_the_tensor_is_called(tmp_path):
    path = tmp_path / "vectors.safetensors"
    save_file({"anything": VECTORS.astype("f4")}, path)
    matrix, description = load_vectors(path)
    np.testing.assert_array_equal(matrix, VECTORS.astype("f4"))
    assert description.source == "matrix vectors.safetensors" and description.tokenizer is None


def test_the_embedding_is_found_in_a_model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    other = np.zeros((40, 6), "f4")
    tensors = {"a.position_embeddings.weight": other, "a.word_embeddings.weight": VECTORS.astype("f4"), "b.bias": other}
    save_file(tensors, path)
    np.testing.assert_array_equal(read_matrix(path), VECTORS.astype("f4"))


def test_two_tensors_of_unknown_names_are_not_guessed_at(tmp_path):
    save_file({"a": VECTORS.astype("f4"), "b": VECTORS.astype("f4")}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no input embedding among its 2 tensors"):
        read_matrix(tmp_path / "x.safetensors")


def test_a_code_file_is_not_a_matrix(tmp_path):
    positional_codes(40, 3).save(tmp_path / "codes.safetensors")
    with pytest.raises(UserError, match=r"codes.safetensors: is a code file, which holds no vectors; give a model"):
        load_vectors(tmp_path / "codes.safetensors")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    np.save(tmp_path / "objects.npy", np.array([[Bomb(sentinel)]], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Bomb(sentinel)))
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    for name, words in (("objects.npy", "pickled objects"), ("bare.npy", "bare.npy"), ("model.bin", "pickled files")):
        with pytest.raises(UserError, match=words):
            load_vectors(tmp_path / name)
    assert not sentinel.exists()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_truncated_files_are_named(tmp_path, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    np.save(path, VECTORS) if suffix == ".npy" else save_file({"x": VECTORS}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=f"cut{suffix}: not a readable"):
        read_matrix(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_row_that_is_not_finite_is_named(tmp_path, value):
    damaged = np.tile(VECTORS, (1000, 1))  # the fault lies beyond the first block that is checked
    damaged[31_234, 3] = value
    np.save(tmp_path / "v.npy", damaged)
    what = "a number beyond 1e\\+15" if value == 1e300 else "NaN or infinity"
    with pytest.raises(UserError, match=f"row 31234 holds {what}"):
        read_matrix(tmp_path / "v.npy")


def test_what_is_no_npy_file_is_not_called_pickled(tmp_path):
    save_file({"x": VECTORS}, tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"x\.npy: not a readable .npy file \(it does not begin as such files do\)"):
        read_matrix(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="holds pickled objects, which are not read"):
        read_matrix(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(5), "has shape"),
        (np.zeros((2, 3, 4)), "has shape"),
        (np.zeros((0, 4)), "has shape"),
        (np.zeros((3, 2), complex), "complex128"),
        (np.array([["a"]]), "<U1"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(tmp_path, array, words):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(UserError, match=words):
        read_matrix(tmp_path / "v.npy")


def test_the_tokenizer_must_have_as_many_tokens(tmp_path, tiny_tokenizer):
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    np.save(tmp_path / "right.npy", np.zeros((tokenizer.vocab_size, 2)))
    np.save(tmp_path / "wrong.npy", np.zeros((tokenizer.vocab_size + 1, 2)))
    _, description = load_vectors(tmp_path / "right.npy", tiny_tokenizer)
    assert description.metadata()["tokenizer_fingerprint"] == tokenizer.fingerprint
    with pytest.raises(UserError, match="give the tokenizer of these vectors"):
        load_vectors(tmp_path / "wrong.npy", tiny_tokenizer)


def test_several_arrays_and_numbers_too_large_are_refused(tmp_path):
    np.savez(tmp_path / "several.npz", a=VECTORS)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(UserError, match="holds several arrays"):
        read_matrix(tmp_path / "several.npy")
    large = VECTORS.astype("f4")
    large[7, 2] = 1e20
    np.save(tmp_path / "large.npy", large)
    with pytest.raises(UserError, match=r"row 7 holds a number beyond 1e\+15"):
        read_matrix(tmp_path / "large.npy")


def test_a_folder_whose_json_is_something_else(tmp_path):
    for name, content in (("config.json", "[]"), ("model.safetensors.index.json", "[]")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="has no weight_map"):
        load_vectors(str(tmp_path))


@pytest.mark.parametrize("shape", ["(10" + 40 * "0" + ", 4)", "(True, 4)", "(" + 5000 * "-" + "1, 4)", "(3, 4"])
def test_a_strange_header_is_one_line(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = tmp_path / "v.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match=r"v\.npy: "):
        read_matrix(path)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match=r"v\.npy: not a readable"):
        read_matrix(path)

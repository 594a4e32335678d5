"""The code table: what verify refuses, what a file survives, and what it does not."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from ksub_ds import CodeTable, plain_codes, positional_codes
from ksub_ds.codes.extension import extend_codes
from ksub_ds.codes.table import reserve_special_tokens, table_widths
from ksub_ds.common.errors import UserError


def test_widths_give_the_first_tables_one_more():
    assert table_widths(512, 3) == (171, 171, 170)
    assert table_widths(512, 8) == (64,) * 8
    with pytest.raises(ValueError, match="embedding_dim = 2"):
        table_widths(2, 3)


@given(st.integers(1, 2000), st.integers(1, 40))
def test_widths_sum_to_the_dimension(dim, tables):
    if tables <= dim:
        widths = table_widths(dim, tables)
        assert sum(widths) == dim and max(widths) - min(widths) <= 1 and list(widths) == sorted(widths, reverse=True)


def test_verify_names_a_collision():
    table = CodeTable([[0, 1], [1, 0], [0, 1]], (2, 2))
    with pytest.raises(ValueError, match=r"tokens 0 and 2 share code \(0, 1\) \(1 collisions"):
        table.verify()
    assert table.count_collisions() == 1


@pytest.mark.parametrize("wrong", [2, -1])
def test_verify_names_a_code_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"token 1 has code {wrong} in table 1 of 2 rows"):
        CodeTable([[0, 1], [1, wrong]], (2, 2)).verify()


@pytest.mark.parametrize(
    ("codes", "sizes"),
    [
        (np.zeros((0, 2), int), (2, 2)),
        (np.zeros(3, int), (2,)),
        (np.zeros((3, 2)), (2, 2)),
        (np.zeros((3, 2), int), (2,)),
        (np.zeros((3, 2), int), (2, 0)),
        (np.full((3, 2), 2**40), (2, 2)),
    ],
)
def test_shapes_that_are_no_code_table(codes, sizes):
    with pytest.raises(ValueError):
        CodeTable(codes, sizes)


def test_codes_are_a_copy_that_cannot_be_written():
    source = np.array([[0, 1], [1, 0]], dtype=np.int32)
    table = CodeTable(source, (2, 2))
    source[0, 0] = 1
    assert table.codes[0, 0] == 0
    with pytest.raises(ValueError):
        table.codes[0, 0] = 1


def test_round_trip_keeps_codes_sizes_and_origin(tmp_path):
    table = positional_codes(1000, 3)
    table.metadata["tokenizer_fingerprint"] = "ab" * 32
    table.save(tmp_path / "codes.safetensors")
    loaded = CodeTable.load(tmp_path / "codes.safetensors")
    assert (loaded.codes == table.codes).all() and loaded.codes.dtype == np.int32
    assert loaded.table_sizes == table.table_sizes and loaded.metadata == table.metadata
    assert loaded.sha256 == table.sha256 != plain_codes(1000).sha256
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]


def test_a_table_that_does_not_verify_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not unique"):
        CodeTable([[0], [0]], (1,)).save(tmp_path / "codes.safetensors")
    assert not list(tmp_path.iterdir())


def _write(path, codes, **metadata):
    save_file({"codes": np.asarray(codes, np.int32)}, path, metadata=metadata)


def test_load_names_the_fault(tmp_path):
    path = tmp_path / "codes.safetensors"
    with pytest.raises(UserError, match=r"codes\.safetensors: no such code file"):
        CodeTable.load(path)
    good = positional_codes(10, 2)
    fields = {"format": "ksub-codes-1", "table_sizes": "4,4", "sha256": good.sha256}
    _write(path, good.codes, **fields)
    assert CodeTable.load(path).num_tokens == 10
    faults = {
        "not unique": (np.zeros((10, 2)), fields),
        "out of range": (good.codes + 3, fields),
        "do not match their sha256": (good.codes[::-1].copy(), fields),
        "format is None": (good.codes, {}),
        "damaged": (good.codes, {"format": "ksub-codes-1", "sha256": good.sha256}),
        "invalid literal": (good.codes, fields | {"table_sizes": "4,x"}),
        "table_sizes must be 2 positive integers": (good.codes, fields | {"table_sizes": "4"}),
    }
    for fault, (codes, metadata) in faults.items():
        _write(path, codes, **metadata)
        with pytest.raises(UserError, match=fault):
            CodeTable.load(path)


def test_any_cut_or_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "codes.safetensors"
    positional_codes(300, 2).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            CodeTable.load(path)
    header = int.from_bytes(whole[:8], "little")
    json.loads(whole[8 : 8 + header])
    for place in range(8 + header, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            CodeTable.load(path)
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="not a readable code file"):
        CodeTable.load(path)


def test_equal_tables_make_equal_files(tmp_path):
    table = positional_codes(11, 2)
    table.metadata.update({f"key {number}": "välue" for number in range(20)})
    for number in range(3):
        table.save(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(3)}) == 1
    assert CodeTable.load(tmp_path / "0").metadata == table.metadata


def test_codes_in_a_type_that_numpy_lacks(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(3, 2, dtype=torch.bfloat16)}, tmp_path / "codes.safetensors", {"format": "x"})
    with pytest.raises(UserError, match="not a readable code file"):
        CodeTable.load(tmp_path / "codes.safetensors")


def test_dedicated_tokens_are_part_of_the_map(tmp_path):
    table = positional_codes(1000, 3)
    some = CodeTable(table.codes, table.table_sizes, table.metadata, dedicated=[3, 40, 999])
    assert some.num_dedicated == 3 and some.dedicated.dtype == np.int32
    assert some.num_parameters(30) == table.num_parameters(30) + 3 * 30
    others = [CodeTable(table.codes, table.table_sizes, dedicated=ids) for ids in ([3, 40], [3, 40, 998], ())]
    assert len({each.sha256 for each in (some, *others)}) == 4 and others[-1].sha256 == table.sha256
    some.save(tmp_path / "codes.safetensors")
    loaded = CodeTable.load(tmp_path / "codes.safetensors")
    assert loaded.dedicated.tolist() == [3, 40, 999] and loaded.sha256 == some.sha256
    assert loaded.metadata == table.metadata and "num_dedicated=3" in repr(loaded)
    with pytest.raises(ValueError):
        loaded.dedicated[0] = 1


def test_without_dedicated_tokens_files_and_fingerprints_are_the_old_ones(tmp_path):
    table = CodeTable([[0, 1], [1, 0], [1, 1]], (2, 2), dedicated=[])
    assert table.sha256 == "d5e9086ee16b48669cd8e6376b4643abf59f0010b74e4899cc852c444759af5e"
    table.save(tmp_path / "codes.safetensors")
    with safe_open(tmp_path / "codes.safetensors", "np") as stream:
        assert stream.metadata()["format"] == "ksub-codes-1" and list(stream.keys()) == ["codes"]


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([1, 3], r"token 3 is not in \[0, 3\)"),
        ([-1, 1], r"token -1 is not in \[0, 3\)"),
        ([2, 1], "distinct and in rising order, but 1 follows 2"),
        ([1, 1], "distinct and in rising order, but 1 follows 1"),
        ([0.5], "list of token ids, not of shape"),
        ([[1]], "list of token ids, not of shape"),
    ],
)
def test_what_is_no_list_of_dedicated_tokens(ids, fault, tmp_path):
    table = CodeTable([[0, 1], [1, 0], [1, 1]], (2, 2), dedicated=[1])
    with pytest.raises(ValueError, match=fault):
        CodeTable(table.codes, (2, 2), dedicated=ids)
    stored = {"codes": table.codes, "dedicated": np.array(ids)}
    save_file(stored, tmp_path / "codes", {"format": "ksub-codes-2", "table_sizes": "2,2", "sha256": table.sha256})
    with pytest.raises(UserError, match=fault):
        CodeTable.load(tmp_path / "codes")


def test_a_file_of_the_new_format_without_its_tensor(tmp_path):
    save_file({"codes": np.zeros((1, 1), np.int32)}, tmp_path / "codes", {"format": "ksub-codes-2"})
    with pytest.raises(UserError, match="not a readable code file"):
        CodeTable.load(tmp_path / "codes")


def test_dedicated_tokens_follow_the_special_and_the_added_ones():
    ordinary = CodeTable(positional_codes(20, 2, table_size=6).codes, (6, 6), dedicated=[0, 1, 19])
    assert reserve_special_tokens(ordinary, [1, 3]).dedicated.tolist() == [0, 2, 21]
    assert extend_codes(ordinary, 4).dedicated.tolist() == [0, 1, 19]


def test_codes_for_the_input_may_repeat_and_are_packed(tmp_path):
    table = CodeTable([[0, 1], [1, 0], [0, 1]], (256, 2), dedicated=[2], unique=False)
    table.verify()
    table.save(tmp_path / "codes.safetensors")
    again = CodeTable.load(tmp_path / "codes.safetensors")
    assert (again.codes == table.codes).all() and not again.unique and again.dedicated.tolist() == [2]
    with safe_open(tmp_path / "codes.safetensors", framework="np") as stream:
        assert stream.get_tensor("codes").dtype == np.uint8
    assert CodeTable([[0]], (257,), unique=False).stored_codes.dtype == np.int32
    small = CodeTable([[0, 1, 4], [3, 4, 2]], (5, 5, 5), unique=False)
    assert small.stored_codes.tolist() == [[0b00001000, 0b1], [0b10100011, 0b0]]
    small.save(tmp_path / "small.safetensors")
    assert (CodeTable.load(tmp_path / "small.safetensors").codes == small.codes).all()
    apart = {"format": "ksub-codes-3", "table_sizes": "5,5,5", "sha256": small.sha256}
    save_file({"codes": small.codes.astype(np.uint8)}, tmp_path / "apart.safetensors", apart)
    with pytest.raises(UserError, match="codes of 3 tables are not packed as 3-bit numbers"):
        CodeTable.load(tmp_path / "apart.safetensors")
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="code out of range"):
            CodeTable([[0, wrong]], (256, 2), unique=False).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="input-only codes take no new tokens"):
        extend_codes(table, 1)

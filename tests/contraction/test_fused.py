"""The fused sum: the box of the codes; its kernels in Triton's interpreter, and compiled for an absent GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds import SubEmbedding, plain_codes, positional_codes
from ksub_ds.contraction.fused import LARGEST_TILE, MOST_OUTSIDE, plan_boxes, tile, why_not_here

from ..model.loss_case import random_codes

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton, of the extra `test`")


def plan(table):
    return plan_boxes(np.asarray(table.codes), table.table_sizes)


@pytest.mark.parametrize(
    ("num_tables", "sizes", "chunks"),
    [
        (2, (1, 501, 501), (4, 4)),
        (3, (63, 63, 63), (1, 1)),
        (4, (23, 23, 529), (1, 5)),
        (6, (64, 64, 64), (1, 1)),
        (8, (25, 125, 125), (1, 1)),
    ],
)
def test_positional_codes_of_a_large_vocabulary_make_a_box(num_tables, sizes, chunks):
    table = positional_codes(250_002, num_tables)
    found = plan(table)
    assert (found.sizes, found.chunks) == (sizes, chunks) and found.inside(table.codes).all()


def test_tables_with_a_few_rows_more_leave_a_few_tokens_outside():
    codes = np.stack(np.unravel_index(np.arange(128**3), (128,) * 3), axis=1)[::9]
    special = np.arange(128, 133)[:, None].repeat(3, axis=1)
    found = plan_boxes(np.concatenate([special, codes]), (133, 133, 133))
    assert found.sizes == (133, 128, 128)
    assert np.flatnonzero(~found.inside(np.concatenate([special, codes]))).tolist() == [0, 1, 2, 3, 4]


def test_two_tables_with_a_few_rows_more_than_whole_chunks():
    codes = np.stack(np.unravel_index(np.arange(256 * 384), (256, 384)), axis=1)[::5]
    special = np.stack([np.arange(256, 261), np.arange(384, 389)], axis=1)
    found = plan_boxes(np.concatenate([special, codes]), (261, 389))
    assert (found.sizes, found.chunks) == ((1, 256, 384), (2, 3))
    assert found.inside(special).sum() == 0 and found.inside(codes).all()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (plain_codes(50), "a single table"),
        (random_codes(5000, (400, 400, 400)), "no box"),  # would be mostly empty
        (random_codes(5000, (3000, 128, 120)), "no box"),
    ],
)
def test_codes_without_a_box_say_why(table, why):
    assert why in plan(table)


def test_without_a_gpu_the_form_is_torch():
    structure = SubEmbedding(positional_codes(1000, 3), 12).structure
    assert structure.fused is None and structure.form == "in torch (no kernels for cpu)"


@needs_triton
def test_other_gpus_keep_the_form_in_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert why_not_here(torch.device("cuda")) == "the kernels are for compute capability 9, and this is 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert str(why_not_here(torch.device("cuda"))).startswith(("None", "triton cannot start: RuntimeError: 0 active"))


def test_nothing_imports_triton_before_a_kernel_is_needed():
    code = "import sys, ksub_ds.model.softmax as s; sys.exit('ksub_ds.contraction.fused_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.integers(1, 300), st.integers(0, 99))
def test_a_box_holds_every_token_inside_once(sizes, tokens, seed):
    space = int(np.prod(sizes, dtype=np.int64))
    cells = np.unique(np.random.default_rng(seed).integers(0, space, tokens))
    codes = np.stack(np.unravel_index(cells, sizes), axis=1)
    found = plan_boxes(codes, tuple(sizes))
    if isinstance(found, str):
        return
    inside = found.inside(codes)
    assert max(found.tiles) <= LARGEST_TILE and (~inside).sum() <= MOST_OUTSIDE
    for size, chunks, rows in zip(found.sizes[1:], found.chunks, found.tiles, strict=True):
        assert (chunks - 1) * rows < size <= chunks * rows
    assert [k for group in sorted(found.groups, key=lambda group: group.start) for k in group] == [*range(len(sizes))]
    for k, kept in enumerate(found.kept):
        assert np.isin(codes[inside, k], kept).all()


def test_tiles():
    assert [tile(size) for size in (1, 16, 17, 63, 125, 128)] == [16, 16, 32, 64, 128, 128]


@pytest.mark.long
@needs_triton
@pytest.mark.timeout(900)
def test_the_kernels_in_the_interpreter():
    """In a process of its own: the interpreter is switched on for all of it, before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.long
@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_compiled_for_an_h100(tmp_path):
    """With the arguments of a real call, at the size of XLM-R: no spilling, and shared memory that exists."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), "90"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} >= {"fold_over_c", "fold_over_j", "fold_over_rows", "fold_far_rows"}
    for kernel in kernels:
        # Triton 3.6 keeps 8 bytes of one kernel on the stack, 3.7 none.
        assert kernel["stack"] <= 16 and kernel["shared"] <= 227 * 1024, kernel
    assert torch.cuda.is_available() or all(kernel["registers"] <= 255 for kernel in kernels)

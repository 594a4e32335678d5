"""The sum over all tokens on a GPU: the same numbers as `Contraction`'s, by kernels that never write W out.

The K tables become three: each of three groups of neighbouring tables counts as one table, whose codes are the
tuples of its members' codes, with the sum of their scores. K = 8 tables of 5 rows are one of 125, one of 125 and one
of 25; the first group of K = 2 is empty, and has the one code (). The tokens are cells of a box (S, J, C);
`ksub_ds.contraction.fused_kernels` has the sums over it. The probability of a member's code is the sum of those of the
group's codes that contain it.

A tile of the kernels holds at most 128 rows of the second and third group; longer axes are cut into chunks, and the
box into pieces, one for each pair of them: two tables of 500 rows are 4 x 4 pieces. Where a table has a few rows more
than chunks hold, such as those of special tokens, the most used ones make the box, and the few tokens outside it are
added one by one. Codes whose box would be mostly empty keep the form in torch: `plan_boxes` decides.

The kernels run on an H100 or H200 where Triton is (it comes with torch for CUDA), and in Triton's interpreter, on a
CPU, when the environment says TRITON_INTERPRET=1. Nothing here asks the device for a value.
"""

import importlib
import importlib.util
import itertools
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

KERNELS = "ksub_ds.contraction.fused_kernels"  # by name: a model's form in one file does without them
SMALLEST_SUM = 1e-25  # under this, float32 terms of Z begin to vanish
LARGEST_TILE = 128  # rows of a chunk of the second and third group
SMALLEST_TILE = 16  # the tensor cores' least
MOST_OUTSIDE = 64  # tokens outside the box
MOST_CELLS = 2**25  # of a box: 128 MB of its bfloat16 parts, and twice that for its gradient
STEP_CELLS = 2**12  # what a step of the loop over the first group costs beside its cells, in cells
PIECE_CELLS = 2**16  # what reading the factors of a piece of the box and writing its sums cost, in cells
CAPABILITY = 9  # Hopper; the tiles overflow the registers of GPUs before it, and the shared memory of those after
PROGRAMS = 528  # wanted per kernel: four for each processor of an H100
MOST_PARTS = 8  # of a sum that is divided over programs


def why_not_here(device: torch.device) -> str | None:
    """Say why no kernel can run on a device; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"no kernels for {device.type}"
    if not all(importlib.util.find_spec(package) for package in ("triton", KERNELS.partition(".")[0])):
        return "triton is not installed"
    if interpreted:
        return None
    if (capability := torch.cuda.get_device_capability(device))[0] != CAPABILITY:
        return f"the kernels are for compute capability {CAPABILITY}, and this is {capability[0]}.{capability[1]}"
    try:
        importlib.import_module("triton").runtime.driver.active.utils  # noqa: B018  builds Triton's launcher
    except Exception as error:  # a compiler or Python.h is missing, or whatever that build meets: torch goes without
        return f"triton cannot start: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None


def tile(size: int) -> int:
    """Return the rows of the tile for `size` codes: a power of two."""
    return max(SMALLEST_TILE, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class BoxPlan:
    """Three groups of tables as the axes of a box.

    Attributes:
        groups: the tables of each axis; neighbours, in the order of the kernels' loops. The first may be empty.
        kept: for each table, its codes inside the box, in rising order.
    """

    groups: tuple[range, range, range]
    kept: tuple[np.ndarray, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The codes of the three groups."""
        first, second, third = (prod(len(self.kept[k]) for k in group) for group in self.groups)
        return first, second, third

    @property
    def chunks(self) -> tuple[int, int]:
        """How many chunks the second and the third axis are cut into."""
        _, second, third = self.sizes
        return _blocks(second, LARGEST_TILE), _blocks(third, LARGEST_TILE)

    @property
    def tiles(self) -> tuple[int, int]:
        """The rows of a chunk of either, as the kernels have them."""
        _, second, third = self.sizes
        return tile(min(second, LARGEST_TILE)), tile(min(third, LARGEST_TILE))

    @property
    def cells(self) -> int:
        """The cells of the box, with the padding of the tiles."""
        return self.sizes[0] * prod(self.chunks) * prod(self.tiles)

    @property
    def cost(self) -> int:
        """What the fold takes, in cells."""
        pieces = prod(self.chunks)
        return self.cells + pieces * (self.sizes[0] * STEP_CELLS + PIECE_CELLS)

    def inside(self, codes: np.ndarray) -> np.ndarray:
        """Return which tokens are in the box, (N,), for codes (N, K)."""
        inside = np.ones(len(codes), dtype=bool)
        for code, kept in zip(codes.T, self.kept, strict=True):
            inside &= np.isin(code, kept)
        return inside


def plan_boxes(codes: np.ndarray, table_sizes: tuple[int, ...]) -> BoxPlan | str:
    """Find the cheapest box for codes (N, K), or say why there is none."""
    if len(table_sizes) < 2:
        return "a single table"
    choices = [_rows_to_keep(codes[:, k], size) for k, size in enumerate(table_sizes)]
    whole = [np.arange(size) for size in table_sizes]
    plans = []
    for ends in itertools.combinations(range(len(table_sizes)), 2):
        parts = [range(*pair) for pair in itertools.pairwise((0, *ends, len(table_sizes)))]
        for first in range(3):
            groups = (parts[first], *(part for at, part in enumerate(parts) if at != first))
            if not (groups[1] and groups[2]):
                continue
            # Of a table that is an axis alone, a part of the rows may do.
            alone = [group.start for group in groups[1:] if len(group) == 1]
            for rows in itertools.product(*(choices[k] for k in alone)):
                kept = whole.copy()
                for k, chosen in zip(alone, rows, strict=True):
                    kept[k] = chosen
                plans.append(BoxPlan((groups[0], groups[1], groups[2]), tuple(kept)))
    for plan in sorted((plan for plan in plans if plan.cells <= MOST_CELLS), key=lambda plan: plan.cost):
        if len(codes) - plan.inside(codes).sum() <= MOST_OUTSIDE:
            return plan
    return "no box of the codes fits the kernels"


def _rows_to_keep(code: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the most used codes of a table that fill chunks, of which few tokens have another; all codes last."""
    count = np.bincount(code, minlength=size)
    most_used = np.argsort(-count, kind="stable")
    left_out = len(code) - np.cumsum(count[most_used])
    filled = (rows for rows in range(LARGEST_TILE, size, LARGEST_TILE) if left_out[rows - 1] <= MOST_OUTSIDE)
    return [*(np.sort(most_used[:rows]) for rows in filled), np.arange(size)]


@dataclass(frozen=True)
class ProgramShape:
    """How the folds are cut into programs.

    Attributes:
        rows: rows of a program that folds over the codes, and
        gradient_rows: rows of a step that folds over the rows.
    """

    rows: int = 128
    gradient_rows: int = 64
    warps: int = 8
    stages: int = 2


class FusedContraction:
    """The box of one code structure on one device, and what its kernels need to know. Build once, use for every block.

    Args:
        codes: (N, K) integers, on the device.
        table_sizes: the K numbers M_k.
        plan: what `plan_boxes` found.
        shape: of the programs. [that for an H100]
    """

    def __init__(self, codes: Tensor, table_sizes: tuple[int, ...], plan: BoxPlan, shape: ProgramShape | None = None):
        self.kernels = importlib.import_module(KERNELS)
        self.emulate = os.environ.get("TRITON_INTERPRET") == "1"
        self.shape = shape or ProgramShape()
        self.table_sizes = table_sizes
        self.codes = codes.to(torch.int32).contiguous()
        self.sizes, self.chunks, self.tiles, self.cells = plan.sizes, plan.chunks, plan.tiles, plan.cells
        self.pieces = prod(self.chunks)
        self.most_parts = max(1, MOST_PARTS // self.pieces)
        self.width = sum(table_sizes)
        self.groups_width = sum(self.sizes)
        sums = self.pieces * (self.sizes[0] + 6 * self.most_parts * sum(self.tiles))
        self.numbers_per_row = 4 * self.groups_width + 2 * self.width + sums

        numbers, device = codes.cpu().numpy().astype(np.int64), codes.device
        offsets = np.concatenate([[0], np.cumsum(table_sizes)])

        def on_device(array: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array, dtype=np.int32), device=device)

        positions = np.full(self.width, -1)
        for k, kept in enumerate(plan.kept):
            positions[offsets[k] + kept] = np.arange(len(kept))
        inside = plan.inside(numbers)
        first, second, third = (
            sum(positions[offsets[k] + numbers[inside, k]] * _stride(plan, group, k) for k in group)
            for group in plan.groups
        )
        (chunk2, j), (chunk3, c) = divmod(second, self.tiles[0]), divmod(third, self.tiles[1])
        cell = (((chunk2 * self.chunks[1] + chunk3) * self.sizes[0] + first) * self.tiles[0] + j) * self.tiles[1] + c
        token_of_cell, cell_of_token = np.full(self.cells, -1), np.full(len(numbers), -1)
        token_of_cell[cell] = np.flatnonzero(inside)
        cell_of_token[inside] = cell
        outside = np.flatnonzero(~inside)
        columns = numbers + offsets[:-1]

        self.offsets, self.positions = on_device(offsets[:-1]), on_device(positions)
        self.token_of_cell, self.cell_of_token = on_device(token_of_cell), on_device(cell_of_token)
        self.group_columns = [on_device(_group_columns(plan, group, offsets)) for group in plan.groups]
        self.layout = on_device(_layout(plan, table_sizes, offsets))
        self.outside = torch.as_tensor(outside, device=device)
        self.outside_columns = on_device(columns[outside].T)
        self.outside_tile = tile(len(outside)) if len(outside) else 0
        self.by_code = on_device(np.argsort(columns.T.ravel(), kind="stable") % len(numbers))
        self.code_starts = on_device(np.searchsorted(np.sort(columns.ravel()), np.arange(self.width + 1)))

    def __repr__(self) -> str:
        outside = f" and {len(self.outside)} tokens" if len(self.outside) else ""
        pieces = f" in {' x '.join(map(str, self.chunks))} pieces" if self.pieces > 1 else ""
        return f"fused, box {' x '.join(map(str, self.sizes))}{pieces}{outside}"

    @property
    def part_dtype(self) -> torch.dtype:
        """Of the high and low parts: the interpreter has no products of bfloat16."""
        return torch.float32 if self.emulate else torch.bfloat16

    @cached_property
    def ones(self) -> Tensor:
        """The box of weights 1."""
        return (self.token_of_cell >= 0).to(self.part_dtype)

    def round_up(self, rows: int) -> int:
        """Return the rows of whole programs, at least those of one."""
        return max(1, _blocks(rows, self.shape.rows)) * self.shape.rows

    def run(self, kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel, on the device of the codes: Triton takes the current one."""
        with torch.cuda.device_of(self.codes):  # does nothing on a CPU
            getattr(self.kernels, kernel)[grid](*arguments, **constants)


def _stride(plan: BoxPlan, group: range, table: int) -> int:
    """Return the distance, among a group's codes, of two that differ by one kept code of a table."""
    return prod(len(plan.kept[later]) for later in group if later > table)


def _group_columns(plan: BoxPlan, group: range, offsets: np.ndarray) -> np.ndarray:
    """Return the columns of the scores that add up to those of a group's codes, (members, codes)."""
    columns = itertools.product(*(offsets[k] + plan.kept[k] for k in group))
    return np.array([*columns]).T


def _layout(plan: BoxPlan, table_sizes: tuple[int, ...], offsets: np.ndarray) -> np.ndarray:
    """Return where each table lies among the scores and in its group, (K, 6).

    Its first column and number of codes among the scores; the group's first column among those of the three groups; the
    number of its kept codes; the distance of two of them in the group; how many codes of the group contain each.
    """
    rows = np.zeros((len(table_sizes), 6), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(plan.sizes)])
    for axis, group in enumerate(plan.groups):
        for k in group:
            kept = len(plan.kept[k])
            repeats = plan.sizes[axis] // kept
            rows[k] = offsets[k], table_sizes[k], starts[axis], kept, _stride(plan, group, k), repeats
    return rows


class FusedWeights:
    """The tokens' weights exp(b_n - max b) in the box, for one pass over the rows; all 1 without a bias."""

    def __init__(self, contraction: FusedContraction, bias: Tensor | None):
        self.weighted = bias is not None
        self.low = self.high = contraction.ones if bias is None else contraction.ones.new_empty(contraction.cells)
        self.bias = self.largest = contraction.offsets if bias is None else bias.detach().contiguous()
        if bias is not None:
            self.largest = self.bias.max()
            self.low = torch.empty_like(self.high)
            block = 1024
            contraction.run(
                "weigh_cells", (_blocks(contraction.cells, block),),
                self.bias, self.largest, contraction.token_of_cell, self.high, self.low, contraction.cells,
                BLOCK=block, EMULATE=contraction.emulate,
            )  # fmt: skip


class FusedSoftmax:
    """The softmax of a block of R rows over all tokens.

    Args:
        contraction: the box.
        weights: of the tokens.
        scores: (R, sum of M_k) float64, the K table scores next to each other.
        labels: (R,) token ids, negative where the label is none of these tokens; None if only log Z is wanted.
        ignore_index: the label of rows that do not count: their loss and their gradients are 0.
        with_gradients: make what the gradients need.

    Attributes:
        log_partition: (R,) log Z, float64.
    """

    def __init__(
        self,
        contraction: FusedContraction,
        weights: FusedWeights,
        scores: Tensor,
        labels: Tensor | None = None,
        ignore_index: int = -100,
        with_gradients: bool = False,
    ):
        self.box, self.weights, self.scores, self.ignore_index = contraction, weights, scores, ignore_index
        self.labels = None if labels is None else labels.contiguous()
        self.rows = len(scores)
        self.padded = contraction.round_up(self.rows)
        self.log_partition = scores.new_empty(self.rows)
        self.far = self._numbers(self.rows, dtype=torch.int32)
        self._make_factors()
        self._fold(with_gradients)

    def _numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scores.new_empty(shape, dtype=dtype)

    def _make_factors(self) -> None:
        box, rows = self.box, self.padded
        (s, j, c), (tile_j, tile_c), (chunks_j, chunks_c) = box.sizes, box.tiles, box.chunks
        self.top = self._numbers(rows, dtype=torch.float64)
        self.e1t = self._numbers(s, rows)
        self.e2, self.e3 = self._numbers(chunks_j, rows, tile_j), self._numbers(chunks_c, rows, tile_c)
        self.e2_parts = [torch.empty_like(self.e2, dtype=box.part_dtype) for _ in range(2)]
        self.e3_parts = [torch.empty_like(self.e3, dtype=box.part_dtype) for _ in range(2)]
        box.run(
            "make_factors", (rows // 16,),
            self.scores, *box.group_columns, self.top, self.e1t, self.e2, *self.e2_parts, self.e3, *self.e3_parts,
            self.rows, rows, box.width, s, j, c, *(len(columns) for columns in box.group_columns),
            BR=16, BI=LARGEST_TILE, BJ=tile_j, BC=tile_c, EMULATE=box.emulate,
        )  # fmt: skip

    def _fold(self, with_gradients: bool) -> None:
        box, weights, shape, rows = self.box, self.weights, self.box.shape, self.padded
        (s, j, c), (tile_j, tile_c), (chunks_j, chunks_c) = box.sizes, box.tiles, box.chunks
        blocks = rows // shape.rows
        steps, parts = _share(s, PROGRAMS // (blocks * box.pieces), box.most_parts)
        g2_part = self._numbers(box.pieces, parts, rows, tile_j)
        g3_part = self._numbers(box.pieces, parts, rows, tile_c)
        g1_part = self._numbers(box.pieces, s, rows) if with_gradients else g2_part
        constants = {
            "BR": shape.rows, "BJ": tile_j, "BC": tile_c, "WEIGHTED": weights.weighted, "STAGES": shape.stages,
            "num_warps": shape.warps,
        }  # fmt: skip
        grid = (blocks, parts, box.pieces)
        box.run(
            "fold_over_c", grid, self.e1t, self.e2, *self.e3_parts, weights.high, weights.low, g1_part, g2_part,
            rows, s, steps, chunks_c, GRADIENTS=with_gradients, **constants,
        )  # fmt: skip
        if with_gradients:
            box.run(
                "fold_over_j", grid, self.e1t, *self.e2_parts, weights.high, weights.low, g3_part,
                rows, s, steps, chunks_j, chunks_c, **constants,
            )  # fmt: skip
        self.scale = self._numbers(rows)
        self.group_probs = self._numbers(self.rows, box.groups_width) if with_gradients else self.scale
        self.outside_probs = self._numbers(self.rows, box.outside_tile) if with_gradients else self.scale
        self.score_probs = self._numbers(self.rows, box.width) if with_gradients else self.scale
        tables, outside = len(box.table_sizes), len(box.outside)
        labels = self.far if self.labels is None else self.labels  # not read without labels
        box.run(
            "finish_rows", (rows // 16,), self.scores, box.outside_columns, box.outside, weights.bias, weights.largest,
            self.top, self.e1t, self.e2, self.e3, g1_part, g2_part, g3_part, labels,
            self.log_partition, self.scale, self.far, self.group_probs, self.outside_probs,
            self.rows, rows, box.width, s, j, c, chunks_j, chunks_c, tables, outside, parts, SMALLEST_SUM,
            self.ignore_index,
            BR=16, BI=LARGEST_TILE, BJ=tile_j, BC=tile_c, BX=box.outside_tile,
            WEIGHTED=weights.weighted, LABELLED=self.labels is not None, GRADIENTS=with_gradients,
        )  # fmt: skip
        box.run(
            "fold_far_rows", (self.rows,), self.scores, box.codes, box.offsets, weights.bias, box.by_code,
            box.code_starts, self.far, self.log_partition, self.score_probs, len(box.codes), tables, box.width,
            BLOCK=1024, WEIGHTED=weights.weighted, GRADIENTS=with_gradients,
        )  # fmt: skip

    def label_losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows' losses (float64), and labels with the -1 that each adds to its bias's gradient, all (R,)."""
        assert self.labels is not None, "made without labels"
        box, block = self.box, 256
        losses, minus_ones = torch.empty_like(self.log_partition), self._numbers(self.rows)
        labels = torch.empty_like(self.labels)
        box.run(
            "label_losses", (_blocks(self.rows, block),), self.scores, box.codes, box.offsets, self.weights.bias,
            self.labels, self.log_partition, losses, labels, minus_ones, self.rows, len(box.table_sizes), box.width,
            self.ignore_index, BLOCK=block, WEIGHTED=self.weights.weighted,
        )  # fmt: skip
        return losses, labels, minus_ones

    def make_score_grads(self) -> Tensor:
        """Make the gradients of the summed losses by the scores, (R, sum of M_k), in place of `score_probs`."""
        box, widest = self.box, tile(max(self.box.table_sizes))
        rows = max(1, min(16, 4096 // widest))
        box.run(
            "make_score_grads", (_blocks(self.rows, rows), len(box.table_sizes)),
            self.group_probs, self.outside_probs, box.outside_columns, box.layout, box.positions, box.codes,
            self.labels, self.far, self.score_probs, self.rows, box.width, box.groups_width, len(box.table_sizes),
            len(box.outside), self.ignore_index, BR=rows, BM=widest, BX=box.outside_tile,
        )  # fmt: skip
        return self.score_probs

    def weigh_(self, log_partition: Tensor, share: Tensor) -> None:
        """Make the gradients those of a softmax over more tokens, of whose Z these have a share; call it before others.

        Args:
            log_partition: (R,) log Z over all of them.
            share: (R,).
        """
        self.log_partition = log_partition
        share = share.float()
        self.scale[: self.rows].mul_(share)
        for probs in (self.group_probs, self.outside_probs, self.score_probs):
            probs.mul_(share.unsqueeze(1))

    def bias_gradient(self) -> Tensor:
        """Return the tokens' probabilities summed over the rows that count, (N,)."""
        box, weights, shape = self.box, self.weights, self.box.shape
        (s, *_), (tile_j, tile_c), tokens = box.sizes, box.tiles, len(box.codes)
        steps, parts = _share(_blocks(self.padded, shape.gradient_rows), PROGRAMS // (s * box.pieces))
        ga_part, gradient = self._numbers(parts, box.cells), self._numbers(tokens)
        box.run(
            "fold_over_rows", (s * box.pieces, parts), self.e1t, *self.e2_parts, self.e3, self.scale, ga_part,
            self.padded, s, steps, box.chunks[1], BR=shape.gradient_rows, BJ=tile_j, BC=tile_c, EMULATE=box.emulate,
            STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip
        box.run(
            "collect_bias_gradient", (_blocks(tokens, 1024),), ga_part, box.cell_of_token, weights.bias,
            weights.largest, gradient, tokens, box.cells, parts, BLOCK=1024,
        )  # fmt: skip
        if len(box.outside):
            gradient.index_copy_(0, box.outside, self.outside_probs.sum(dim=0)[: len(box.outside)])
        box.run(
            "add_far_rows_to_bias_gradient", (_blocks(tokens, 512),), self.scores, box.codes, box.offsets, weights.bias,
            self.far, self.log_partition, gradient, tokens, self.rows, len(box.table_sizes), box.width,
            BLOCK=512, ROWS=2048,
        )  # fmt: skip
        return gradient


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _share(steps: int, wanted: int, most: int = MOST_PARTS) -> tuple[int, int]:
    """Divide steps over about `wanted` programs: (steps of each, programs)."""
    each = _blocks(steps, min(max(wanted, 1), most))
    return each, _blocks(steps, each)

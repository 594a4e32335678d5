"""Products of float32 matrices by tensor cores, which multiply bf16 numbers.

Each operand is a sum of bf16 parts of falling size, and a product that of all pairs of parts whose numbers add up to
less than there are parts: three of two parts each are within 2^-16 of each term, six of three within 2^-24. Tensor
cores cut off where they add to float32: over many thousand terms that is 1e-5 of a sum whose terms have one sign. So
the inner dimension is cut into pieces, whose sums are added outside.

On CUDA, products of bf16 matrices with a float32 result; elsewhere the same numbers, by float32 products.
"""

import torch
from torch import Tensor

LONGEST_SUM = 1024  # terms that are added up in a tensor core


def split(matrix: Tensor, parts: int = 2) -> list[Tensor]:
    """Split a float32 matrix into bf16 parts, the largest first."""
    found = [matrix.bfloat16()]
    for _ in range(parts - 1):
        matrix = matrix - found[-1]
        found.append(matrix.bfloat16())
    return found


def pairs(parts: int) -> list[tuple[int, int]]:
    """List which parts of the two operands are multiplied, small products first."""
    return [(first, total - first) for total in reversed(range(parts)) for first in range(total + 1)]


def product(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the product of two matrices in float32, given the parts of both."""
    total: Tensor | None = None
    for first, second in pairs(len(left)):
        term = _long_product(left[first], right[second])
        total = term if total is None else total.add_(term)
    assert total is not None, "there is at least one part"
    return total


def _long_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, in pieces of the inner dimension."""
    terms = left.shape[1]
    whole = terms // LONGEST_SUM * LONGEST_SUM
    if whole == 0:
        return multiply(left, right)
    pieces = left[:, :whole].unflatten(1, (-1, LONGEST_SUM)).transpose(0, 1)
    total = multiply(pieces, right[:whole].unflatten(0, (-1, LONGEST_SUM))).sum(dim=0)
    return total if whole == terms else total.add_(multiply(left[:, whole:], right[whole:]))


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two bf16 matrices, or of each of two batches, in float32."""
    if left.device.type != "cuda":
        return left.float() @ right.float()
    kernel = torch.mm if left.ndim == 2 else torch.bmm
    return kernel(left, right, out_dtype=torch.float32)

"""Which products the loss can do with: its error against float64 when a GPU's tensor cores round the operands.

    python benchmarks/gpu/rounding.py [--json benchmarks/results/rounding.json]        about 4 minutes on one core

Runs on a CPU: the operands of the products over the leaf matrix are rounded as tensor cores read them, products and
sums are those of float32. "x3" stands for three products of high and low parts, high·high + high·low + low·high.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # loss.py, measuring.py
import loss
import measuring

from ksub_ds.contraction.sum_product import DenseLeaves

Product = Callable[[Tensor, Tensor], Tensor]
D = 512


def to_tf32(values: Tensor) -> Tensor:
    """Round to 10 bits of the mantissa, to nearest, ties to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)


def to_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def one_product(rounded: Callable[[Tensor], Tensor]) -> Product:
    return lambda left, right: rounded(left) @ rounded(right)


def three_products(rounded: Callable[[Tensor], Tensor]) -> Product:
    def product(left: Tensor, right: Tensor) -> Tensor:
        high_left, high_right = rounded(left), rounded(right)
        low_left, low_right = rounded(left - high_left), rounded(right - high_right)
        return low_left @ high_right + high_left @ low_right + high_left @ high_right

    return product


PRODUCTS: dict[str, Product] = {
    "float32": torch.matmul,
    "TF32": one_product(to_tf32),
    "bf16": one_product(to_bf16),
    "bf16 x3": three_products(to_bf16),
    "TF32 x3": three_products(to_tf32),
}


class RoundedLeaves(DenseLeaves):
    """The leaf matrix whose products are those of `product`."""

    product: Product

    def forward(self, e_RM: Tensor) -> Tensor:
        return type(self).product(e_RM, self.matrix.t())

    def backward(self, grad_RS: Tensor) -> Tensor:
        return type(self).product(grad_RS, self.matrix)

    def add_gradient_(self, e_RM: Tensor, grad_RS: Tensor) -> None:
        assert self.gradient is not None
        self.gradient += type(self).product(grad_RS.t(), e_RM)


def measure(rows: int, tokens: int) -> list[dict]:
    """Return the worst errors of each kind of product, over clustered and positional codes and two kinds of bias."""
    results = []
    for name, product in PRODUCTS.items():
        leaves = type("Leaves", (RoundedLeaves,), {"product": staticmethod(product)})
        with mock.patch("ksub_ds.contraction.sum_product.DenseLeaves", leaves):
            errors = [
                loss.measure_error(make(tokens), rows, D, True, 1.0, zipf=zipf)
                for make in (loss.clustered, loss.positional)
                for zipf in (False, True)
            ]
        row = {key: max(error[key] for error in errors) for key in ("loss_error", "gradient_error")}
        results.append({"product": name, **row, "ok": all(error["ok"] for error in errors)})
    return results


@dataclass
class Options:
    rows: int = 64
    """Rows of the decoder input."""
    tokens: int = loss.N
    """N, the size of the vocabulary."""
    json: Path | None = None
    """Write the numbers here too."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    rows = measure(options.rows, options.tokens)
    shown = [
        [
            row["product"],
            f"{row['loss_error']:.1e}",
            f"{row['gradient_error']:.1e}",
            "ok" if row["ok"] else "not enough",
        ]
        for row in rows
    ]
    measuring.print_table("Error against float64", ["products", "loss", "gradients", ""], shown)
    measuring.save(options.json, {"rows": options.rows, "tokens": options.tokens, "products": rows})


if __name__ == "__main__":
    main()

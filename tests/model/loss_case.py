"""One problem of the factorised loss, solved by us in float32, densely in float64 and densely in float32."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from ksub_ds import CodeTable, SubEmbedding, factorized_cross_entropy


def random_codes(num_tokens, sizes, seed=0):
    chosen = np.random.default_rng(seed).choice(int(np.prod(sizes)), num_tokens, replace=False)
    return CodeTable(np.stack(np.unravel_index(chosen, sizes), axis=1), sizes)


def dedicated(table, count, seed=0):
    """The same codes, with `count` random tokens dedicated; negative counts from N."""
    count = min(count, table.num_tokens) if count >= 0 else table.num_tokens + count
    ids = np.sort(np.random.default_rng(seed).choice(table.num_tokens, count, replace=False))
    return CodeTable(table.codes, table.table_sizes, dedicated=ids)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def relative(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm().clamp_min(0.1)).item()


class Case:
    """One problem, solved by us in float32, densely in float64 and densely in float32."""

    def __init__(self, table, rows=37, dim=24, scale=1.0, with_bias=True, seed=0, bias_scale=1.0, mixing=False):
        generator = torch.Generator().manual_seed(seed)
        self.layer = SubEmbedding(table, dim, mixing=mixing)
        if mixing:
            self.layer.mixing.copy_(torch.randn(dim, dim, generator=generator) / dim**0.5)
        with torch.no_grad():
            for weights in [*self.layer.tables, *self.own_rows()]:
                weights.copy_(torch.randn(weights.shape, generator=generator))
        self.hidden = (torch.randn(rows, dim, generator=generator) * scale).requires_grad_()
        self.bias = (torch.randn(table.num_tokens, generator=generator) * bias_scale).requires_grad_()
        self.bias = self.bias.detach().requires_grad_() if with_bias else None
        self.labels = torch.randint(table.num_tokens, (rows,), generator=generator)
        self.labels[1::5] = -100

    def own_rows(self):
        return [] if self.layer.dedicated_rows is None else [self.layer.dedicated_rows]

    def tensors(self):
        bias = [] if self.bias is None else [self.bias]
        return [self.hidden, *self.layer.tables, *self.own_rows(), *bias]

    def ours(self):
        loss = factorized_cross_entropy(self.hidden, self.layer, self.labels, self.bias)
        return loss.detach(), gradients(loss, self.tensors())

    def dense(self, dtype):
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in self.tensors()]
        hidden, tables = tensors[0], tensors[1 : 1 + len(self.layer.tables)]
        weight = torch.cat([table[self.layer.codes[:, k].long()] for k, table in enumerate(tables)], dim=1)
        if self.layer.mixing is not None:
            weight = weight @ self.layer.mixing.to(dtype).t()
        if self.own_rows():
            weight = weight.index_add(0, self.layer.dedicated, tensors[1 + len(tables)])
        logits = hidden @ weight.t()
        loss = F.cross_entropy(logits if self.bias is None else logits + tensors[-1], self.labels)
        return loss.detach(), gradients(loss, tensors)

    def check(self, gradient_limit=5e-6):
        loss, ours = self.ours()
        reference, exact = self.dense(torch.float64)
        _, naive = self.dense(torch.float32)
        assert loss.dtype == torch.float32
        assert abs(loss.double() - reference) <= 5e-6 * max(1.0, abs(reference.item()))
        for mine, plain, wanted in zip(ours, naive, exact, strict=True):
            assert relative(mine, wanted) <= max(gradient_limit, 3 * relative(plain, wanted))


@st.composite
def any_table(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    space = int(np.prod(sizes))
    return random_codes(draw(st.integers(1, min(space, 200))), sizes, draw(st.integers(0, 99)))


def maxima_that_meet_nowhere(gap, with_bias, count=0):
    """Every table has a favourite code, but no token has all of them: Z loses exp(gap). `count` are dedicated."""
    codes = np.array([(a, b, c) for a in range(3) for b in range(3) for c in range(3) if len({a, b, c} & {0}) == 0
                      or (a, b, c).count(0) == 1])  # fmt: skip
    case = Case(dedicated(CodeTable(codes, (3, 3, 3)), count), rows=6, dim=3, with_bias=with_bias)
    with torch.no_grad():
        for table in case.layer.tables:
            table.copy_(torch.tensor([[1.0], [-0.01], [0.02]]))
        for rows in case.own_rows():
            rows.mul_(0.01)
        case.hidden.fill_(gap / 2)
        case.hidden[::2] += torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    return case

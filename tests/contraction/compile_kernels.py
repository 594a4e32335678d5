"""Compile the fused sum's kernels for a GPU that is not there, by the arguments of a call; print what each takes.

    python tests/contraction/compile_kernels.py 90          one JSON line a kernel: registers, stack, shared memory

The calls are those of layers of XLM-R's size with tensors on the CPU; instead of being launched, kernels are compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from ksub_ds.contraction.fused import FusedContraction, FusedSoftmax, FusedWeights, plan_boxes

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """What Triton asks its driver when it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def used(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack) + int(local)}


class Compiled(FusedContraction):
    """Compiles what it should run."""

    def run(self, kernel, grid, *arguments, **constants):
        compiled = getattr(self.kernels, kernel).warmup(*arguments, grid=grid, **constants)
        line = {"name": kernel, **used(compiled.asm["cubin"]), "shared": compiled.metadata.shared}
        print(json.dumps(line), flush=True)


def compile_all(with_bias, specials, size=128, num_tables=3, rows=4915, tokens=20_000):
    cells = np.random.default_rng(0).choice(size**num_tables, tokens, replace=False)
    codes = np.stack(np.unravel_index(cells, (size,) * num_tables), axis=1)
    codes = np.concatenate([codes, np.arange(size, size + specials)[:, None].repeat(num_tables, axis=1)])
    sizes = (size + specials,) * num_tables
    box = Compiled(torch.as_tensor(codes, dtype=torch.int32), sizes, plan_boxes(codes, sizes))
    bias = torch.zeros(len(codes)) if with_bias else None
    scores, labels = torch.zeros(rows, box.width, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    softmax = FusedSoftmax(box, FusedWeights(box, bias), scores, labels, with_gradients=True)
    softmax.label_losses()
    softmax.make_score_grads()
    if with_bias:
        softmax.bias_gradient()


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGPU(int(sys.argv[1])))
    compile_all(True, 0)
    compile_all(True, 5)
    compile_all(False, 0)
    compile_all(True, 0, size=501, num_tables=2)

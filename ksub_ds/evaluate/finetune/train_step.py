"""One optimizer update, in this process alone or on several ranks through the pretraining's DeepSpeed engine.

Both sum the loss over the batch and divide by its size, so a batch gives the same update however it is divided.
Weights and moments are fp32; bf16 is autocast inside the forward pass.
"""

from typing import Any, Protocol

from ksub_ds.common import distributed
from ksub_ds.pretrain.engine import build_optimizer, compose_config, set_learning_rate, start_engine

BETAS, EPSILON = (0.9, 0.98), 1e-6  # as in pretraining; the paper's Table 6 names none


def make_classifier_module(model: Any, regression: bool, precision: str) -> Any:
    """Wrap a model as a module that maps a batch to (summed loss, logits).

    Args:
        model: sequence classifier of transformers.
        regression: squares of one output, in place of cross entropy.
        precision: of the forward pass, "fp32" or "bf16".
    """
    import torch
    from torch.nn import functional

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, labels_B: Any, **inputs: Any) -> Any:
            device_type = labels_B.device.type
            # inside the forward pass: DeepSpeed switches off an autocast from outside
            with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
                logits_BC = self.model(**inputs).logits
            logits_BC = logits_BC.float()
            if regression:
                return functional.mse_loss(logits_BC.squeeze(1), labels_B, reduction="sum"), logits_BC
            return functional.cross_entropy(logits_BC, labels_B, reduction="sum"), logits_BC

    return Classifier()


class TrainStep(Protocol):
    """Forward, backward and update of a module."""

    module: Any
    optimizer: Any

    def forward(self, **batch: Any) -> Any:
        """Return the module's outputs."""
        ...

    def apply(self, loss: Any, learning_rate: float) -> None:
        """Go backward and do one update of AdamW."""
        ...


class SingleProcessStep:
    """A TrainStep in this process alone.

    Args:
        module: of `make_classifier_module`.
        learning_rate: before the first `apply`, which sets it anew.
        weight_decay: of AdamW, on matrices and tables only.
        clipping: largest norm of a gradient; 0 for none.
    """

    def __init__(self, module: Any, learning_rate: float, weight_decay: float, clipping: float):
        self.module, self._clipping = module, clipping
        self.optimizer = build_optimizer(module, learning_rate, BETAS, EPSILON, weight_decay)
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def forward(self, **batch: Any) -> Any:
        """Return the module's outputs."""
        return self.module(**batch)

    def apply(self, loss: Any, learning_rate: float) -> None:
        """Go backward and do one update of AdamW."""
        import torch

        loss.backward()
        if self._clipping:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeedStep:
    """A TrainStep on all ranks of this process group: DeepSpeed adds up the gradients.

    Args:
        module: of `make_classifier_module`.
        learning_rate: before the first `apply`, which sets it anew.
        weight_decay: of AdamW, on matrices and tables only.
        clipping: largest norm of a gradient; 0 for none.
        batch_size: rows of all ranks together; a multiple of their number.
    """

    def __init__(self, module: Any, learning_rate: float, weight_decay: float, clipping: float, batch_size: int):
        world_size = distributed.world_size()
        config = compose_config(
            {"zero_optimization": {"stage": 0}, "steps_per_print": 1_000_000_000},
            micro_batch_size=batch_size // world_size,
            accumulation=1,
            world_size=world_size,
            precision="fp32",
            gradient_clipping=clipping,
        )
        optimizer = build_optimizer(module, learning_rate, BETAS, EPSILON, weight_decay)
        self._engine = start_engine(module, optimizer, config)
        self.module, self.optimizer = self._engine.module, optimizer

    def forward(self, **batch: Any) -> Any:
        """Return the module's outputs."""
        return self._engine(**batch)

    def apply(self, loss: Any, learning_rate: float) -> None:
        """Go backward and do one update of AdamW."""
        self._engine.backward(loss)
        set_learning_rate(self._engine, learning_rate)
        self._engine.step()

"""Trained models at a part of their strength: how well is what they have learned exchanged for what they have kept?

    base + alpha * (trained - base)

Every method has such a number, and anyone can turn it after the training, so a comparison at alpha = 1 alone compares
points of curves. It is the scale of a LoRA and that of the feedback of TOAST; for what has no such scale it is a place
on the line from the weights before the training to those after it, as in WiSE-FT (https://arxiv.org/abs/2109.01903).
New modules, such as a head, stay as they were trained.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pandas as pd
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from tables import column_at, mean_and_deviation
from torch import nn

# What these train is new in the model, so that there is nothing to go back to.
NOT_SCALED = ("linear", "vpt-deep")


class Strength:
    """The strength of what a method trains.

    Args:
        model: ready for the training, and not yet trained.
        new_modules: names of modules that stay as they are trained.
    """

    def __init__(self, model: nn.Module, new_modules: list[str]) -> None:
        self.model = model
        self.is_toast = isinstance(model, PeftModel) and hasattr(model, "rescaled_feedback")
        has_scale = self.is_toast or any(isinstance(module, LoraLayer) for module in model.modules())
        self.start = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and not has_scale
            and not any(f".{module}." in f".{name}" for module in new_modules)
        }

    def at(self, alpha: float) -> AbstractContextManager[None]:
        """The trained model at a strength, in a `with` block."""
        if self.start:
            return self._between(alpha)
        return self.model.rescaled_feedback(alpha) if self.is_toast else rescale_adapter_scale(self.model, alpha)

    @contextmanager
    @torch.no_grad()
    def _between(self, alpha: float) -> Iterator[None]:
        trained = {name: self.model.get_parameter(name).clone() for name in self.start}
        for name, start in self.start.items():
            self.model.get_parameter(name).lerp_(start, 1 - alpha)
        try:
            yield
        finally:
            for name, weight in trained.items():
                self.model.get_parameter(name).copy_(weight)


def curves(runs: pd.DataFrame, columns: list[str], scales: list[float], digits: int = 3) -> pd.DataFrame:
    """One row for each method and strength, from the trained model downwards: means and standard deviations.

    Args:
        runs: one row for each training.
        columns: the measured ones to show.
        scales: where these were measured besides 1.
        digits: of these columns.
    """
    tested = runs[(runs["split"] == "test") & ~runs["method"].isin(NOT_SCALED)]
    rows = []
    for method, group in tested.groupby("method", sort=False):
        for alpha in sorted({1.0, *scales}, reverse=True):
            names = {column: column if alpha == 1 else column_at(column, alpha) for column in columns}
            measured = {column: mean_and_deviation(group[name], digits) for column, name in names.items()}
            rows.append({"method": f"`{method}`", "alpha": f"{alpha:g}"} | measured)
    return pd.DataFrame(rows)

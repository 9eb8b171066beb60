"""`torch.export` and ONNX: the exported program is the model with its adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as tf

from ..helpers import output_of, steered
from ..zoo import inputs_of, tiny_model
from .test_compile import VARIANTS

BATCH = torch.export.Dim("batch")


class Logits(torch.nn.Module):
    """The model with a plain tensor for its output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def vit(**options: Any) -> tuple[Logits, torch.Tensor]:
    """A ViT with an adapter whose effect is visible, and images; of no more blocks than the passes need."""
    base = tiny_model(tf.ViTForImageClassification, num_hidden_layers=1 + options.get("feedback_from", 0))
    base_output = output_of(base)
    model = steered(base, **options)
    assert (output_of(model) - base_output).abs().max() > 0.1
    return Logits(model).eval(), inputs_of(model)["pixel_values"]


@pytest.mark.parametrize(("variant", "strict"), [("lite", True), ("middle", False)])
def test_exported_program(variant: str, strict: bool, tmp_path: Path) -> None:
    """Saved, loaded and run on another batch size."""
    model, images = vit(**VARIANTS[variant])
    program = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": {0: BATCH}}, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (images, torch.randn(5, *images.shape[1:])):
        with torch.no_grad():
            torch.testing.assert_close(exported(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    model, images = vit(**VARIANTS["middle"] | VARIANTS["lite"])
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes={"pixel_values": {0: BATCH}}, verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [argument.name for argument in session.get_inputs()]
    for batch in (images, torch.randn(5, *images.shape[1:])):
        [logits] = session.run(None, {name: batch.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(batch).numpy(), rtol=1e-4, atol=1e-4)


def test_training_goes_on_after_export() -> None:
    """Export leaves neither traced tensors nor a frozen model behind."""
    model, images = vit()
    expected = model(images)
    torch.export.export(model, (images,))
    output = model(images)
    assert torch.equal(output, expected)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_disabled_adapter_exports_the_base_model() -> None:
    base = tiny_model(tf.ViTForImageClassification, num_hidden_layers=2)
    base_output = output_of(base)
    model = steered(base)
    with model.disable_adapter():
        program = torch.export.export(Logits(model), (inputs_of(model)["pixel_values"],))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(inputs_of(model)["pixel_values"]), base_output)

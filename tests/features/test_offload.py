"""Models whose weights are offloaded, loaded by way of the meta device, or spread over devices."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toast_peft import TopDownConfig

from ..helpers import adapted, assert_same, blocks_of, gradients, loss_of, output_of, steered, takes_adapters
from ..zoo import VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model

CPU = torch.device("cpu")
AFTER_BLOCKS = {"model.norm", "lm_head", "vit.layernorm", "classifier"}


def half_on_disk(model: nn.Module) -> dict[str, str]:
    """A device map: the upper two blocks on disk, everything else on the CPU."""
    blocks = {name: block for name, block in model.named_modules() if block in blocks_of(model)}
    device_map = {name: "disk" if index >= 2 else "cpu" for index, name in enumerate(blocks)}
    for name, _ in model.named_parameters():
        if not any(name.startswith(f"{block}.") for block in blocks):
            device_map[name] = "cpu"
    return device_map


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=CPU)


def to_disk_by_half(model: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, half_on_disk(model), main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS = {"cpu": to_cpu, "disk": to_disk, "half on disk": to_disk_by_half}
offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


def is_offloaded(block: nn.Module) -> bool:
    return {parameter.device.type for parameter in block.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("model_class", "offload", "variant"),
    [(tf.LlamaForCausalLM, "half on disk", variant) for variant in VARIANTS]
    + [(tf.ViTForImageClassification, "half on disk", "double bias")]
    + list(product(VIT_AND_LLAMA, ["cpu", "disk"], ["full", "middle"])),
)
def test_adapter_on_an_offloaded_base_model(model_class: type, offload: str, variant: str, tmp_path: Path) -> None:
    """The weights of the base model are on meta except while a module runs; those of the adapter are not."""
    reference = steered(tiny_model(model_class), **(VARIANTS | {"double bias": {"double_value_bias": True}})[variant])
    expected, inputs = output_of(reference), inputs_of(reference)
    reference.save_pretrained(tmp_path / "adapter")
    base = OFFLOADS[offload](tiny_model(model_class), tmp_path / "weights")
    assert is_offloaded(blocks_of(base)[-1])
    base_output = output_of(base, inputs)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same(output_of(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), base_output)


@offloads
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_adapter_offloaded_with_its_model(model_class: type, offload: Callable, tmp_path: Path) -> None:
    """Dispatched after the adapter was made, which may put the adapter's own weights on meta too."""
    base_output = output_of(tiny_model(model_class))
    model = steered(tiny_model(model_class))
    expected, inputs = output_of(model), inputs_of(model)
    offload(model, tmp_path)
    assert is_offloaded(blocks_of(model)[-1])
    assert_same(output_of(model, inputs), expected)
    with model.disable_adapter():
        assert_same(output_of(model, inputs), base_output)


@offloads
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_training_on_an_offloaded_base_model(model_class: type, offload: Callable, tmp_path: Path) -> None:
    plain = steered(tiny_model(model_class)).train()
    base = offload(tiny_model(model_class), tmp_path)
    model = get_peft_model(base, TopDownConfig()).train()
    assert is_offloaded(blocks_of(base)[-1])
    weights = {name: p for name, p in plain.state_dict().items() if "topdown_" in name}
    model.load_state_dict(weights, strict=False)
    for trained in (plain, model):
        loss_of(trained, inputs_of(plain)).backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_unload_leaves_an_offloaded_base_model(model_class: type, tmp_path: Path) -> None:
    expected, inputs = output_of(tiny_model(model_class)), inputs_of(tiny_model(model_class))
    model = adapted(to_disk(tiny_model(model_class), tmp_path))
    output_of(model, inputs)
    base = model.unload()
    assert_same(output_of(base, inputs), expected)
    assert is_offloaded(blocks_of(base)[-1])


@takes_adapters
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_from_pretrained_with_device_map(model_class: type, r: int, tmp_path: Path) -> None:
    """transformers places the weights by the map and loads the adapter.

    `PeftModel.from_pretrained` cannot: whatever the method, it spreads such a model anew without its weights.
    """
    reference = steered(tiny_model(model_class), r=r)
    expected, inputs = output_of(reference), inputs_of(reference)
    reference.save_pretrained(tmp_path / "adapter")
    plain = tiny_model(model_class)
    plain.save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "weights")
    base = model_class.from_pretrained(tmp_path / "base", device_map=half_on_disk(plain), offload_folder=folder)
    assert is_offloaded(blocks_of(base)[-1])
    base.load_adapter(str(tmp_path / "adapter"))
    assert is_offloaded(blocks_of(base)[-1])
    assert_same(output_of(base, inputs), expected)


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_low_cpu_mem_usage(model_class: type, r: int, tmp_path: Path) -> None:
    """The adapter is made on meta, and its weights are assigned when they are read."""
    reference = steered(tiny_model(model_class), r=r)
    reference.save_pretrained(tmp_path)
    made = get_peft_model(tiny_model(model_class), TopDownConfig(r=r), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in made.named_parameters() if "topdown_" in name} == {"meta"}
    model = PeftModel.from_pretrained(tiny_model(model_class), tmp_path, low_cpu_mem_usage=True)
    assert_same(output_of(model), output_of(reference))
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert_same(output_of(model), output_of(reference))


class MetaAsSecondDevice(TorchDispatchMode):
    """Lets tensors come back from meta, with zeros for their values: a second device where there is none.

    As with real devices, everything that mixes the two is an error.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


def place(device: str, *modules: nn.Module) -> None:
    """Put modules on a device to which they also move their inputs, as accelerate does for a device map."""

    def move_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return send_to_device(args, device), send_to_device(kwargs, device)

    for module in modules:
        module.to(device).register_forward_pre_hook(move_inputs, with_kwargs=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_model_split_over_two_devices(model_class: type, variant: str) -> None:
    """The feedback layers are made where their blocks are, and the feedback is moved from one to the next.

    Only the upper blocks can be on meta: nothing is moved to feedback layers on meta, as those count as offloaded.
    """
    base = tiny_model(model_class).requires_grad_(False)
    inputs = inputs_of(base)
    place("cpu", *blocks_of(base)[:2])
    place("meta", *blocks_of(base)[2:], *(module for name, module in base.named_modules() if name in AFTER_BLOCKS))
    model = adapted(base, **VARIANTS[variant]).train()
    layers = next(module for name, module in model.named_modules() if name.endswith("feedback_path.layers"))
    devices = {int(index): next(layer.parameters()).device.type for index, layer in layers.items()}
    assert devices == {index: "cpu" if index < 2 else "meta" for index in devices}
    with MetaAsSecondDevice():
        loss = model(**inputs)[0].square().mean()
        assert loss.device.type == "meta"
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.device == parameter.device for parameter in trained)

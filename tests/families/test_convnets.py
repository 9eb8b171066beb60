"""ConvNets: feedback from stage to stage down to the image, compared with the formulas on a plain base model."""

import copy
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.families.convnets import ConvNetFeedbackLayer, StageShape

from ..golden.convnets import folded_identity, parts_of, reference_forward
from ..helpers import (
    adapted,
    assert_same,
    assert_same_gradients,
    first_tensor,
    gradients,
    leaves_untouched,
    loss_of,
    output_of,
    steer,
    steered,
)
from ..zoo import (
    CONVNETS,
    CONVNEXT_AND_RESNET,
    HEADS,
    NUM_BLOCKS,
    RANGES,
    VARIANTS,
    images,
    readable,
    tiny_model,
    with_variants,
)

# With other layers, with and without a head, and with the outputs of several stages.
ALL_CLASSES = [cls for cls in (*CONVNETS, *HEADS) if cls.__name__.startswith(("Conv", "Res", "Reg"))]
KINDS = VARIANTS | {"lite random": {"r": 4, "init_weights": False}, "lite early": {"r": 4, "feedback_from": 3}}
ODD_SIZE = (70, 49)  # the total stride is 32

# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    ("model_class", "variant", "size"),
    [(*pair, ODD_SIZE) for pair in with_variants(ALL_CLASSES, KINDS)] + [(cls, "full", (64, 64)) for cls in CONVNETS],
    ids=readable,
)
def test_output_is_that_of_the_formulas(model_class: type, variant: str, size: tuple[int, int]) -> None:
    base = tiny_model(model_class).double()
    model = steered(copy.deepcopy(base).float(), **KINDS[variant]).double()
    inputs = {"pixel_values": images(*size)["pixel_values"].double()}
    with torch.no_grad():
        expected = first_tensor(reference_forward(base, model, inputs))
        found, plain = first_tensor(model(**inputs)), first_tensor(base(**inputs))
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("model_class", "variant"), with_variants(CONVNETS, VARIANTS))
def test_gradients_are_those_of_the_formulas(model_class: type, variant: str) -> None:
    base = tiny_model(model_class).requires_grad_(False)
    model = steered(copy.deepcopy(base), **VARIANTS[variant]).double()
    base, inputs = base.double(), {"pixel_values": images(*ODD_SIZE)["pixel_values"].double()}
    loss_of(model, inputs).backward()
    found = gradients(model)
    model.zero_grad()
    loss_of(lambda **inputs: reference_forward(base, model, inputs), inputs).backward()
    assert_same_gradients(found, gradients(model))
    assert all("topdown_" in name and gradient.any() for name, gradient in found.items())


@pytest.mark.parametrize("checked", ["image", "stem"])
@pytest.mark.parametrize("variant", RANGES)
def test_gradients_through_pass_1(variant: str, checked: str) -> None:
    """What the caller differentiates or trains below the feedback is in the graph of both passes."""
    base = tiny_model(tf.ResNetForImageClassification).requires_grad_(False)
    model = steered(copy.deepcopy(base), **RANGES[variant])
    found, expected = (
        {"pixel_values": images(64, 64)["pixel_values"].requires_grad_(checked == "image")} for _ in "12"
    )
    stems = [parts_of(m)[0].requires_grad_(checked == "stem") for m in (model, base)]
    loss_of(model, found).backward()
    loss_of(lambda **inputs: reference_forward(base, model, inputs), expected).backward()
    pairs = [[inputs["pixel_values"]] if checked == "image" else list(stem.parameters())
             for inputs, stem in zip((found, expected), stems, strict=True)]  # fmt: skip
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_class", CONVNETS)
def test_normalize_features(model_class: type) -> None:
    """Whether the prompt is compared with the features after the final norm, by model type if there is one."""
    if "ConvNext" not in model_class.__name__:
        with pytest.raises(ValueError, match="`normalize_features=True`, but 're(s|g)net' has no final norm"):
            adapted(tiny_model(model_class), normalize_features=True)
        return
    by_type, true, false = (steered(tiny_model(model_class), normalize_features=n) for n in (None, True, False))
    assert_same(output_of(by_type, images(64, 64)), output_of(true, images(64, 64)))
    assert not torch.allclose(output_of(by_type, images(64, 64)), output_of(false, images(64, 64)))


@pytest.mark.parametrize(("channels", "to"), [(12, 4), (10, 4), (4, 4), (3, 5)])
def test_start_of_the_chain(channels: int, to: int) -> None:
    """Full and Lite start from the same map, in which every channel has a part."""
    z, node = torch.randn(2, channels, 3, 2), StageShape(nn.Conv2d(1, 1, 1), to, channels, 2)
    layer = ConvNetFeedbackLayer(node)
    layer.update_layer("full", TopDownConfig())
    layer.update_layer("lite", TopDownConfig(r=2))
    full, lite = (layer(z, name, (6, 4))[0] for name in ("full", "lite"))
    expected = torch.einsum("bchw,cdij->bdhiwj", z, folded_identity(channels, to, 2)).reshape(2, to, 6, 4)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(lite, expected)
    assert (full[:, :, ::2, ::2] == full[:, :, 1::2, 1::2]).all()
    if channels == to:
        assert torch.equal(full[:, :, ::2, ::2], z)


@pytest.mark.parametrize("options", [{}, {"r": 4}, {"init_weights": False}, {"r": 4, "init_weights": False}], ids=str)
@pytest.mark.parametrize("model_class", CONVNETS)
def test_every_part_gets_a_gradient_within_three_steps(model_class: type, options: dict[str, Any]) -> None:
    model = steered(tiny_model(model_class))
    prompt = {name: value for name, value in model.state_dict().items() if "topdown_prompt" in name}
    model = adapted(tiny_model(model_class), **options)
    model.load_state_dict(prompt, strict=False)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, images(64, 64)).backward()
        optimizer.step()
    assert [name for name, p in trainable.items() if not (p.grad.isfinite().all() and p.grad.any())] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


# ----------------------------------------------------------------------------------------------------- the two passes


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ALL_CLASSES, RANGES))
def test_stages_that_are_not_needed_are_skipped(model_class: type, variant: str) -> None:
    model = adapted(tiny_model(model_class), **RANGES[variant])
    first, last = model.active_peft_config.feedback_range(NUM_BLOCKS)
    stem, stages = parts_of(model)
    calls: Counter = Counter()
    for name, module in [("stem", stem), *enumerate(stages)]:
        inside = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
        inside.register_forward_hook(lambda *_, name=name: calls.update([name]))
    output_of(model)
    assert calls == {i: (i < first) + (i >= last) for i in range(NUM_BLOCKS)} | {"stem": 1 + (last == 0)}
    calls.clear()
    with model.disable_adapter():
        output_of(model)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.ResNetForImageClassification, tf.RegNetForImageClassification])
def test_running_statistics_come_from_the_last_pass(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant]).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [copy.deepcopy(norm) for norm in norms]
    inputs: dict[nn.Module, torch.Tensor] = {}
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, _: inputs.update({norm: args[0]}))
    output_of(model)
    for norm, old in zip(norms, before, strict=True):
        old(inputs[norm])
        assert norm.num_batches_tracked == 1 and norm.track_running_stats
        assert torch.equal(norm.running_mean, old.running_mean)
        assert torch.equal(norm.running_var, old.running_var)


@pytest.mark.parametrize("model_class", CONVNEXT_AND_RESNET)
def test_exception_inside_of_pass_1(model_class: type) -> None:
    model = steered(tiny_model(model_class)).train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = output_of(model)
    model.load_state_dict(buffers, strict=False)
    with parts_of(model)[1][2].layers[0].register_forward_hook(lambda *_: 1 / 0):
        with pytest.raises(ZeroDivisionError):
            output_of(model)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.load_state_dict(buffers, strict=False)
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ALL_CLASSES, RANGES))
def test_recorded_hidden_states_are_those_of_the_second_pass(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    model = steered(copy.deepcopy(base), **RANGES[variant])
    with torch.no_grad():
        expected = reference_forward(base, model, images(64, 64), output_hidden_states=True).hidden_states
        found = model(**images(64, 64), output_hidden_states=True).hidden_states
        as_tuple = model(**images(64, 64), return_dict=False)
    assert len(found) == len(expected) == NUM_BLOCKS + 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(as_tuple, tuple)


def test_stage_past_the_backbone_is_refused() -> None:
    model = steered(tiny_model(tf.ResNetForImageClassification))
    with pytest.raises(RuntimeError, match="Block 1 was called past the forward"):
        parts_of(model)[1][1](torch.randn(1, 8, 4, 4))


# -------------------------------------------------------------------------------------------------- as a PEFT method


@pytest.mark.parametrize(
    ("model_class", "options", "message"),
    [
        (tf.ResNetForImageClassification, {}, "backbone_type='convnext', the model has 'resnet'"),
        (tf.ConvNextForImageClassification, {"hidden_sizes": [8, 12, 12, 24]}, "hidden_size=20, the model has 24"),
        (tf.ConvNextForImageClassification, {"hidden_sizes": [8, 12, 20], "depths": [1, 1, 1], "num_stages": 3},
         "num_blocks=4, the model has 3"),
        (tf.ConvNextForImageClassification, {"hidden_sizes": [8, 16, 12, 20]}, "layers.2.topdown_linear2.*has shape"),
        (tf.ConvNextForImageClassification, {"patch_size": 2}, "layers.0.topdown_linear1.*has shape"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_base_model_is_refused(model_class: type, options: dict, message: str, tmp_path: Path) -> None:
    steered(tiny_model(tf.ConvNextForImageClassification)).save_pretrained(tmp_path)
    other = tiny_model(model_class, **options)
    with leaves_untouched(other), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("model_class", CONVNEXT_AND_RESNET)
def test_adapters_of_different_ranges(model_class: type) -> None:
    """Their features are of different stages and so of different widths."""
    base = tiny_model(model_class)
    base_output = output_of(base)
    model = steered(copy.deepcopy(base))
    full = output_of(model)
    model.add_adapter("early", TopDownConfig(feedback_from=2, r=2, modules_to_save=["classifier"]))
    model.set_adapter("early")
    assert torch.equal(output_of(model), base_output)
    steer(model, "early")
    early = output_of(model)
    with torch.no_grad():
        torch.testing.assert_close(early, reference_forward(base, model, images(64, 64))[0], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(output_of(model), full)
    model.delete_adapter("default")
    assert torch.equal(output_of(model), early)
    assert torch.equal(output_of(model.unload(), images(64, 64)), base_output)


def test_modules_inside_of_the_stem_are_counted_once() -> None:
    """PEFT keeps a copy of what it trains, which is no further downsampling layer."""
    model = adapted(tiny_model(tf.ConvNextForImageClassification), modules_to_save=["patch_embeddings"])
    model.add_adapter("second", TopDownConfig())
    weights = dict(model.named_parameters())
    [weight] = [weights[name] for name in weights if "layers.0.topdown_linear1.second" in name]
    assert weight.shape == (8, 3, 4, 4)


@pytest.mark.parametrize("model_class", CONVNEXT_AND_RESNET)
def test_on_top_of_injected_lora(model_class: type) -> None:
    convolutions = ["patch_embeddings", "downsampling_layer.1", "convolution"]
    lora = LoraConfig(r=2, target_modules=convolutions, init_lora_weights=False)
    base = inject_adapter_in_model(lora, tiny_model(model_class), adapter_name="below")
    expected = output_of(base)
    model = steered(copy.deepcopy(base))
    assert not torch.allclose(output_of(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            output_of(model), reference_forward(base, model, images(64, 64))[0], rtol=1e-4, atol=1e-4
        )


def test_trainable_parameters(capsys: pytest.CaptureFixture) -> None:
    adapted(tiny_model(tf.ConvNextForImageClassification)).print_trainable_parameters()
    chain = sum(c * d * s * s + d * d for c, d, s in ((20, 12, 2), (12, 12, 2), (12, 8, 2), (8, 3, 4)))
    assert f"trainable params: {chain + 20 + 20 * 20:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("model_class", CONVNEXT_AND_RESNET)
def test_float32_adapter_on_bfloat16_model(model_class: type, autocast: bool) -> None:
    base = tiny_model(model_class).to(torch.bfloat16)
    inputs = {"pixel_values": images(64, 64)["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16) if autocast else ExitStack():
        expected = output_of(base, inputs)
        model = adapted(base)
        assert {p.dtype for name, p in model.named_parameters() if "topdown_" in name} == {torch.float32}
        assert torch.equal(output_of(model, inputs), expected)
        set_all_of_linear2(model)
        loss_of(model, inputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def set_all_of_linear2(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "topdown_linear2" in name:
            parameter.fill_(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "variant"), [*zip(CONVNEXT_AND_RESNET, ["lite", "middle"], strict=True)])
def test_compiled_in_one_graph(model_class: type, variant: str) -> None:
    base = tiny_model(model_class, depths=[1, 1, 1, 1])  # each layer is compiled once for each pass
    plain, model = (steered(copy.deepcopy(base), **VARIANTS[variant]).train() for _ in range(2))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        for trained, forward in ((plain, plain), (model, run)):
            inputs = images(*ODD_SIZE)
            loss = forward(pixel_values=inputs["pixel_values"] + step).logits.square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in trained.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                        parameter.grad = None
    torch.testing.assert_close(output_of(model), output_of(plain, images(64, 64)), rtol=1e-4, atol=1e-4)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["dwconv"]}, "`target_modules=.*'dwconv'.* a ConvNet has none.*`feedback_from`"),
        ({"exclude_modules": ["stages.1"]}, "`exclude_modules=.*a ConvNet has none"),
        ({"layers_to_transform": [1, 3]}, r"`layers_to_transform=\[1, 3\]`.*a ConvNet has none"),
        ({"double_value_bias": True}, "`double_value_bias=True`.*a ConvNet has none"),
        ({"feedback_from": 5}, "does not fit a model with 4 blocks"),
        ({"feedback_from": 2, "normalize_features": True}, "output of the last stage, 3, and the .* from stage 1"),
        ({"modules_to_save": ["embeddings"]}, "`modules_to_save` names 'embeddings'"),
        ({"modules_to_save": ["embeddings"], "feedback_to": 2}, "`modules_to_save` names 'embeddings'"),
        ({"modules_to_save": ["stages.3"]}, "`modules_to_save` names 'stages.3'"),
        ({"modules_to_save": ["encoder"]}, "`modules_to_save` names 'encoder'"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    model = tiny_model(tf.ConvNextForImageClassification)
    with leaves_untouched(model), pytest.raises(ValueError, match=message):
        adapted(model, **options)


def test_backbone_without_final_norm() -> None:
    with pytest.raises(ValueError, match="ConvNextBackbone has no final norm 'layernorm'.*normalize_features=False"):
        adapted(tiny_model(tf.ConvNextBackbone), normalize_features=None)
    assert adapted(tiny_model(tf.ConvNextBackbone), feedback_from=3, normalize_features=None)(
        **images(64, 64)
    ).feature_maps


def test_several_backbones() -> None:
    both = nn.ModuleDict({"first": tiny_model(tf.ResNetModel), "second": tiny_model(tf.ViTModel)})
    with pytest.raises(ValueError, match=r"several backbones: \['first', 'second'\].*`target_modules`"):
        adapted(both)
    names = [name for name, _ in adapted(both, target_modules=["v_proj"]).named_parameters() if "topdown_" in name]
    assert names and all(".second." in name for name in names)


def test_convnet_inside_of_another_model() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny_model(tf.ResNetBackbone)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixel_values).feature_maps[0].mean((2, 3))

    base = Detector().eval()
    expected = base(**images(64, 64))
    model = adapted(base)
    assert torch.equal(model(**images(64, 64)), expected)
    assert model.active_peft_config.backbone_type == "resnet"


def test_stride_of_the_modules_counts() -> None:
    """A stride that is not that of the model's code is read from the modules; one that changes later is noticed."""
    base = tiny_model(tf.ConvNextForImageClassification)
    convolution = base.convnext.encoder.stages[1].downsampling_layer[1]
    convolution.stride = (1, 1)
    model = steered(base)
    output_of(model)
    convolution.stride = (2, 2)
    with pytest.raises(RuntimeError, match="does not have the stride 1"):
        output_of(model)


def test_another_number_of_channels_is_noticed() -> None:
    model = steered(tiny_model(tf.ConvNextForImageClassification))
    with pytest.raises(ValueError, match="The input of stage 0 has 1 channels, but the feedback for it has 3"):
        output_of(model, {"pixel_values": torch.randn(1, 1, 64, 64)})

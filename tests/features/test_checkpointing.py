"""Gradients of what is trained along, no graph where none is needed, and gradient checkpointing."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from ..golden.reference import ReferenceModel
from ..helpers import adapted, assert_same_gradients, blocks_of, gradients, loss_of, steered, turn_prompts
from ..zoo import NUM_BLOCKS, RANGES, VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model

EMBEDDINGS = {tf.ViTForImageClassification: "vit.embeddings", tf.LlamaForCausalLM: "embed_tokens"}


def training(model_class: type, **options: Any) -> PeftModel:
    return steered(tiny_model(model_class), **options).train()


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_every_part_gets_a_gradient_at_once(model_class: type, init_weights: bool, r: int) -> None:
    """After one backward, and within two steps none of them is zero, also from the no-op start."""
    model = adapted(tiny_model(model_class), r=r, init_weights=init_weights).train()
    turn_prompts(model)  # a random one may point away from all tokens of so small an input
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        assert all(isinstance(p.grad, torch.Tensor) and p.grad.isfinite().all() for p in trainable.values())
        optimizer.step()
    assert [name for name, p in trainable.items() if not p.grad.any()] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_with_lora_below(model_class: type) -> None:
    """LoRA that trains along is a part of both passes."""
    base = tiny_model(model_class).requires_grad_(False)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = inject_adapter_in_model(lora, base, adapter_name="below")
    model = steered(copy.deepcopy(base))
    assert any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    loss_of(model).backward()
    found = gradients(model)
    model.zero_grad()
    loss_of(ReferenceModel(base, model), inputs_of(base)).backward()
    of_feedback = {name: p.grad for name, p in model.named_parameters() if "topdown_" in name}
    of_lora = {f"base_model.model.{name}": gradient for name, gradient in gradients(base).items()}
    assert_same_gradients(found, of_feedback | of_lora)


# ------------------------------------------------------------------------------- trained modules before the feedback


@pytest.mark.parametrize(
    ("model_class", "variant", "checkpointing"),
    [(cls, variant, None) for cls in VIT_AND_LLAMA for variant in VARIANTS]
    + list(product(VIT_AND_LLAMA, ["full", "middle"], [False, True])),
)
def test_gradients_of_trained_embeddings(model_class: type, variant: str, checkpointing: bool | None) -> None:
    """Both passes read the embeddings, so both have to be in the graph."""
    base = tiny_model(model_class, tie_word_embeddings=False).requires_grad_(False)
    name = EMBEDDINGS[model_class]
    embeddings = next(module for key, module in base.named_modules() if key.endswith(name)).requires_grad_(True)
    model = steered(copy.deepcopy(base), modules_to_save=[name], **VARIANTS[variant]).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss_of(model).backward()
    trained = next(m for key, m in model.named_modules() if key.endswith(f"{name}.modules_to_save.default"))
    found = {key: p.grad for key, p in trained.named_parameters()}
    model.zero_grad()
    loss_of(ReferenceModel(base, model), inputs_of(base)).backward()
    assert_same_gradients(found, {key: p.grad for key, p in embeddings.named_parameters()})


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_trained_tokens(variant: str) -> None:
    base = tiny_model(tf.LlamaForCausalLM, tie_word_embeddings=False).requires_grad_(False)
    tokens = inputs_of(base)["input_ids"][0, :3].unique().tolist()
    base.model.embed_tokens.requires_grad_(True)
    model = steered(copy.deepcopy(base), trainable_token_indices=tokens, **VARIANTS[variant])
    loss_of(model).backward()
    [found] = [p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    loss_of(ReferenceModel(base, model), inputs_of(base)).backward()
    torch.testing.assert_close(found, base.model.embed_tokens.weight.grad[tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_of_inputs(model_class: type, variant: str) -> None:
    """A caller who differentiates the inputs (saliency, soft prompts) gets the derivative of both passes."""
    base = tiny_model(model_class).requires_grad_(False)
    model = steered(copy.deepcopy(base), **RANGES[variant])
    found, expected = (
        torch.autograd.grad(loss_of(m, {name: x}), x)[0]
        for m in (model, ReferenceModel(base, model))
        for name, x in [differentiable_input(base)]
    )
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def differentiable_input(model: nn.Module) -> tuple[str, torch.Tensor]:
    [(name, value)] = inputs_of(model).items()
    if name == "input_ids":
        name, value = "inputs_embeds", model.get_input_embeddings()(value)
    return name, value.detach().requires_grad_()


# -------------------------------------------------------------------------------------- no graph where none is needed


def saved_in_first_pass(model: PeftModel) -> int:
    """Number of tensors that autograd has kept when the last block of pass 1 is done."""
    saved, at_the_end_of_a_pass = [], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor.detach()  # the tensor itself would hold the node that saves it, and never be freed

    last_block = blocks_of(model)[-1]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        last_block.register_forward_hook(lambda *_: at_the_end_of_a_pass.append(len(saved))),
    ):
        loss_of(model)
    assert len(at_the_end_of_a_pass) == 2 and at_the_end_of_a_pass[1] > at_the_end_of_a_pass[0]
    return at_the_end_of_a_pass[0]


@pytest.mark.parametrize("head", [False, True], ids=["feedback only", "and head"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_first_pass_of_a_frozen_model_keeps_no_graph(model_class: type, variant: str, head: bool) -> None:
    name = "lm_head" if model_class is tf.LlamaForCausalLM else "classifier"
    options = {"modules_to_save": [name]} if head else {}
    assert saved_in_first_pass(training(model_class, **options, **VARIANTS[variant])) == 0


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_first_pass_keeps_no_graph_for_inputs_that_only_checkpointing_wants(model_class: type) -> None:
    """PEFT makes the embeddings' output require a gradient for checkpointing; nobody reads it."""
    model = training(model_class)
    model.enable_input_require_grads()
    assert saved_in_first_pass(model) == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_first_pass_behind_trained_embeddings_keeps_its_graph(model_class: type, variant: str) -> None:
    model = training(model_class, modules_to_save=[EMBEDDINGS[model_class]], **VARIANTS[variant])
    assert saved_in_first_pass(model) > 0


def test_forward_without_gradients_keeps_no_graph() -> None:
    model = training(tf.LlamaForCausalLM, modules_to_save=["embed_tokens"])
    with torch.no_grad():
        assert not model(**inputs_of(model)).logits.requires_grad
    assert model(**inputs_of(model)).logits.requires_grad


# ------------------------------------------------------------------------------------------- gradient checkpointing


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def checkpointed(model_class: type, use_reentrant: bool, before: bool, **options: Any) -> PeftModel:
    base = tiny_model(model_class)
    if before:
        enable_checkpointing(base, use_reentrant)
    model = steered(base, **options)
    if not before:
        enable_checkpointing(model, use_reentrant)
    return model.train()


@pytest.mark.parametrize("before", [True, False], ids=["enabled before", "enabled after"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_is_enabled_before_or_after_the_adapter_is_made(
    model_class: type, use_reentrant: bool, before: bool
) -> None:
    plain, model = training(model_class), checkpointed(model_class, use_reentrant, before)
    for m in (plain, model):
        loss_of(m).backward()
    assert_same_gradients(gradients(model), gradients(plain))
    assert all(block.gradient_checkpointing for block in blocks_of(model))


@pytest.mark.skipif(
    not hasattr(tf.PreTrainedModel, "activation_checkpointing_enable"), reason="`every_n_layers` needs Python 3.11"
)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_every_other_block(model_class: type, use_reentrant: bool) -> None:
    plain, model = training(model_class), training(model_class)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant}, every_n_layers=2)
    for m in (plain, model):
        loss_of(m).backward()
    assert_same_gradients(gradients(model), gradients(plain))
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [i % 2 == 0 for i in range(NUM_BLOCKS)]


@pytest.mark.parametrize(
    ("model_class", "variant", "use_reentrant"),
    [(cls, variant, False) for cls in VIT_AND_LLAMA for variant in VARIANTS]
    + [(cls, variant, True) for cls in VIT_AND_LLAMA for variant in ("full", "middle")],
)
def test_two_forwards_before_one_backward(model_class: type, variant: str, use_reentrant: bool) -> None:
    plain = training(model_class, **VARIANTS[variant])
    model = checkpointed(model_class, use_reentrant, before=False, **VARIANTS[variant])
    for m in (plain, model):
        first, second = ({name: x[[row]] for name, x in inputs_of(m).items()} for row in (0, 1))
        losses = loss_of(m, first), loss_of(m, second)
        (losses[0] - 2 * losses[1]).backward()
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("between", ["disabled", "other adapter", "no_grad"])
def test_backward_after_something_else_ran(use_reentrant: bool, between: str) -> None:
    """The blocks are run again in backward as they ran in the forward, whatever the model is used for meanwhile."""
    plain = training(tf.LlamaForCausalLM)
    model = checkpointed(tf.LlamaForCausalLM, use_reentrant, before=False)
    model.add_adapter("other", adapted(tiny_model(tf.LlamaForCausalLM)).peft_config["default"])
    loss_of(plain).backward()
    loss = loss_of(model)
    if between == "disabled":
        with model.disable_adapter(), torch.no_grad():
            loss_of(model)
    elif between == "other adapter":
        model.set_adapter("other")
        loss_of(model).detach()
        model.set_adapter("default")
    else:
        with torch.no_grad():
            loss_of(model)
    loss.backward()
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", [tf.ViTForImageClassification, tf.SwinForImageClassification])
def test_forward_without_adapter_and_backward_with_it(model_class: type, use_reentrant: bool) -> None:
    """The forward was the base model's, so the backward is as well."""
    found = []
    for checkpointing in (False, True):
        model = adapted(tiny_model(model_class), init_weights=False).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        size = model.config.image_size
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with model.disable_adapter():
            loss = model(pixel_values=images).logits.square().sum()
        loss.backward()
        found.append(images.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * found[0].abs().max().item())


@pytest.mark.parametrize("switch", ["eval", "disable"])
def test_checkpointing_can_be_switched_off(switch: str) -> None:
    model, plain = checkpointed(tf.ViTModel, False, before=False), training(tf.ViTModel)
    for m in (model, plain):
        loss_of(m).backward()
        m.zero_grad()
        m.gradient_checkpointing_disable() if switch == "disable" else m.eval()
        loss_of(m).backward()
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_saves_memory_and_recomputes(model_class: type, use_reentrant: bool) -> None:
    """Pass 2 is checkpointed: in backward the MLP of each block runs once more."""
    model = checkpointed(model_class, use_reentrant, before=False)
    calls: list[int] = []
    for block in blocks_of(model):
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = loss_of(model)
    assert len(calls) == 2 * NUM_BLOCKS
    loss.backward()
    assert len(calls) == 3 * NUM_BLOCKS


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_unload_leaves_the_base_models_checkpointing(model_class: type, use_reentrant: bool) -> None:
    plain, base = tiny_model(model_class).train(), tiny_model(model_class)
    enable_checkpointing(base, use_reentrant)
    functions = [block._gradient_checkpointing_func for block in blocks_of(base)]
    model = steered(base).train()
    loss_of(model).backward()
    base = model.unload().requires_grad_(True)
    for block, function in zip(blocks_of(base), functions, strict=True):
        assert block._gradient_checkpointing_func is function
    base.zero_grad()
    for m in (plain, base):
        m.enable_input_require_grads()
        loss_of(m).backward()
    assert_same_gradients(gradients(base), gradients(plain))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_dropout_is_the_same_in_the_recomputation(use_reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = steered(tiny_model(tf.ViTModel, hidden_dropout_prob=0.3), r=4, lora_dropout=0.2).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        torch.manual_seed(3)
        loss_of(model).backward()
        results.append(gradients(model))
    assert_same_gradients(*results)


def test_finite_differences() -> None:
    """Central differences in float64, apart from the reference."""
    model = training(tf.ViTModel, r=4).double()
    inputs = {"pixel_values": inputs_of(model)["pixel_values"].double()}
    loss_of(model, inputs).backward()
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                losses.append(loss_of(model, inputs).item())
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
        expected = (parameter.grad * direction).sum().item()
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-6)

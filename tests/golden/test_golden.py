"""Numbers recorded from the official code, see fixtures/README.md."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from toast_peft import from_official_checkpoint
from toast_peft.config import OFFICIAL_STAGES

FIXTURES = Path(__file__).parent / "fixtures"
VIT_MODES = ("toast", "toast-lite")
LLAMA_RANGES = {"full": (4, 0), "early": (3, 0), "late": (4, 2), "both": (3, 2), "both_wide": (3, 1)}
LLAMA_MODES = [(name, "topdown") for name in LLAMA_RANGES] + [("full", "topdown-lora")]
EXACT = 1e-10  # float64, relative to the largest entry


class Golden:
    """One fixture file."""

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = {key: value for key, value in file.metadata().items()}

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose key begins with the prefix, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def base_model(self) -> nn.Module:
        """The transformers model with the recorded weights, in float64."""
        config = json.loads(self.metadata["hf_config"])
        model_class = getattr(transformers, config.pop("model_class"))
        if model_class._supports_sdpa:  # the eager attention casts to float32 inside
            config["attn_implementation"] = "sdpa"
        model = model_class(model_class.config_class(**config))
        model.load_state_dict(self.below("hf/"))
        return model.double()

    def checkpoint(self, lite: bool) -> dict[str, torch.Tensor]:
        """What the official code would save."""
        return self.below("official/") | (self.below("official_lora/") if lite else {})


@pytest.fixture(scope="module")
def vit() -> Golden:
    return Golden("vit")


@pytest.fixture(scope="module")
def llama() -> Golden:
    return Golden("llama")


@pytest.fixture(scope="module")
def convnext() -> Golden:
    return Golden("convnext")


@pytest.fixture
def rms_norm_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def vit_model(golden: Golden, mode: str) -> PeftModel:
    return from_official_checkpoint(golden.base_model(), golden.checkpoint(lite=mode == "toast-lite")).train()


def llama_model(golden: Golden, name: str, mode: str) -> PeftModel:
    feedback_from, feedback_to = LLAMA_RANGES[name]
    checkpoint = golden.checkpoint(lite=mode == "topdown-lora")
    return from_official_checkpoint(
        golden.base_model(), checkpoint, feedback_from=feedback_from, feedback_to=feedback_to
    ).train()


def official_name(name: str, feedback_to: int = 0) -> str:
    """The official name of a trained parameter."""
    prefix = "model" if "base_model.model.model." in name else "enc"
    if "classifier" in name:
        return "head.last_layer." + name.rpartition(".")[2]
    if "topdown_prompt" in name:
        return f"{prefix}.prompt"
    if "topdown_transform" in name:
        return f"{prefix}.top_down_transform"
    block, parameter = name.split("feedback_path.layers.")[1].split(".")[:2]
    linear, _, factor = parameter.removeprefix("topdown_").partition("_")
    decoder = f"{prefix}.decoders.{int(block) - feedback_to}.{'linear' if linear == 'linear1' else 'linear2'}"
    return f"{decoder}.lora_{factor}" if factor else f"{decoder}.weight"


def trained(model: PeftModel, feedback_to: int = 0) -> dict[str, nn.Parameter]:
    """The trained parameters under their official names."""
    return {
        official_name(name, feedback_to): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def record(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Filled at the next forward: the mask, and for each block the feedback."""
    masks, feedback = {}, {}
    path = next(module for name, module in model.named_modules() if name.endswith("feedback_path"))
    path.register_forward_hook(lambda module, args, output: feedback.update(output))
    path.selection.topdown_prompt["default"].register_forward_hook(
        lambda module, args, output: masks.update(mask=output)
    )
    return masks, feedback


def check_forward(golden: Golden, below: str, mask: str, model: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Mask, feedback, hidden states and logits."""
    masks, feedback = record(model)
    output = model(**inputs, output_hidden_states=True)
    assert_close(masks["mask"], golden.tensors[mask])
    expected = golden.below(f"{below}/feedback/td.")
    assert {str(block) for block in feedback} == set(expected)
    for block, td in feedback.items():
        assert_close(td, expected[str(block)])
    hidden_states = golden.below(f"{below}/pass2/hidden.")
    assert len(output.hidden_states) == len(hidden_states)
    # transformers puts the normed features in the last place of a language model's.
    compared = len(hidden_states) - (model.config.model_type == "llama")
    for index in range(compared):
        assert_close(output.hidden_states[index], hidden_states[str(index)])
    assert_close(output.logits, golden.tensors[f"{below}/pass2/logits"])


def check_training(golden: Golden, below: str, parameters: dict[str, nn.Parameter], loss_function: callable) -> None:
    """Gradients, losses and parameters over five steps of SGD."""
    assert set(parameters) == set(golden.below(f"{below}/train/grad/"))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        losses.append(loss_function())
        losses[-1].backward()
        if step == 0:
            check_tensors({name: parameter.grad for name, parameter in parameters.items()}, golden, below, "grad")
        optimizer.step()
    losses.append(loss_function())
    assert_close(torch.stack(losses), golden.tensors[f"{below}/train/losses"])
    check_tensors(parameters, golden, below, "param_after")


def check_tensors(tensors: dict[str, torch.Tensor], golden: Golden, below: str, what: str) -> None:
    for name, expected in golden.below(f"{below}/train/{what}/").items():
        assert_close(tensors[name], expected)


@pytest.mark.parametrize("mode", VIT_MODES)
def test_vit_forward(vit: Golden, mode: str) -> None:
    inputs = {"pixel_values": vit.tensors["input/pixel_values"].double()}
    check_forward(vit, mode, "feedback/mask", vit_model(vit, mode), inputs)


@pytest.mark.parametrize("mode", VIT_MODES)
def test_vit_training(vit: Golden, mode: str) -> None:
    model = vit_model(vit, mode)
    inputs = {"pixel_values": vit.tensors["input/pixel_values"].double(), "labels": vit.tensors["input/labels"]}
    check_training(vit, mode, trained(model), lambda: model(**inputs).loss)


def convnext_inputs(golden: Golden) -> dict[str, torch.Tensor]:
    return {"pixel_values": golden.tensors["input/pixel_values"].double(), "labels": golden.tensors["input/labels"]}


def test_convnext_forward(convnext: Golden) -> None:
    model = from_official_checkpoint(convnext.base_model(), convnext.checkpoint(lite=False)).train()
    masks, feedback = record(model)
    output = model(**convnext_inputs(convnext), output_hidden_states=True)
    assert_close(masks["mask"].movedim(-1, 1), convnext.tensors["feedback/mask"])
    assert sorted(feedback) == [0, 1, 2, 3]
    for stage, td in feedback.items():
        assert_close(td, convnext.tensors[f"toast/feedback/td.{stage}"])
        assert_close(output.hidden_states[1 + stage], convnext.tensors[f"toast/pass2/stage_out.{stage}"])
    assert_close(output.logits, convnext.tensors["toast/pass2/logits"])
    assert_close(output.loss, convnext.tensors["toast/train/losses"][0])


def test_convnext_training(convnext: Golden) -> None:
    model = from_official_checkpoint(convnext.base_model(), convnext.checkpoint(lite=False)).train()
    check_training(convnext, "toast", trained(model), lambda: model(**convnext_inputs(convnext)).loss)


def llama_inputs(golden: Golden) -> dict[str, torch.Tensor]:
    return {name: golden.tensors[f"input/{name}"] for name in ("input_ids", "attention_mask")}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a causal language model in the logits' dtype; transformers casts to float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize(("name", "mode"), LLAMA_MODES)
def test_llama_forward(llama: Golden, name: str, mode: str) -> None:
    check_forward(
        llama, f"{name}/{mode}", f"{name}/feedback/mask", llama_model(llama, name, mode), llama_inputs(llama)
    )


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize(("name", "mode"), LLAMA_MODES)
def test_llama_loss_and_gradients(llama: Golden, name: str, mode: str) -> None:
    model, labels = llama_model(llama, name, mode), llama.tensors["input/labels"]
    loss = cross_entropy(model(**llama_inputs(llama)).logits, labels)
    assert_close(loss, llama.tensors[f"{name}/{mode}/cross_entropy"])
    loss.backward()
    parameters = trained(model, feedback_to=LLAMA_RANGES[name][1])
    assert set(parameters) == set(llama.below(f"{name}/{mode}/train/grad/"))
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    check_tensors(gradients, llama, f"{name}/{mode}", "grad")
    with_labels = model(**llama_inputs(llama), labels=labels).loss
    assert_close(with_labels, llama.tensors[f"{name}/{mode}/cross_entropy"], tolerance=1e-6)


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize("mode", ["topdown", "topdown-lora"])
def test_llama_training(llama: Golden, mode: str) -> None:
    model = llama_model(llama, "full", mode)
    inputs, labels = llama_inputs(llama), llama.tensors["input/labels"]
    check_training(llama, f"full/{mode}", trained(model), lambda: cross_entropy(model(**inputs).logits, labels))


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize("name", LLAMA_RANGES)
def test_llama_pretuning(llama: Golden, name: str) -> None:
    """With the variational loss: total loss, gradients, and for all blocks five steps."""
    feedback_from, feedback_to = LLAMA_RANGES[name]
    stage = OFFICIAL_STAGES["llama-pretuning"] | {"feedback_from": feedback_from, "feedback_to": feedback_to}
    model = from_official_checkpoint(llama.base_model(), llama.checkpoint(lite=False), **stage).train()
    labels = llama.tensors["input/labels"]

    def loss_function() -> torch.Tensor:
        return cross_entropy(model(**llama_inputs(llama)).logits, labels) + model.variational_loss()

    loss = loss_function()
    assert_close(loss, llama.tensors[f"{name}/pretune/loss"])
    loss.backward()
    parameters = trained(model, feedback_to)
    assert set(parameters) == set(llama.below(f"{name}/pretune/train/grad/"))
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    check_tensors(gradients, llama, f"{name}/pretune", "grad")
    if name == "full":
        check_training(llama, "full/pretune", parameters, loss_function)


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize(
    ("model_name", "mode", "weight"),
    [("vit", "toast", 0.1), ("vit", "toast-lite", 0.1), ("convnext", "toast", 0.01)]
    + [("llama", mode, 0.01) for mode in ("full/topdown", "full/topdown-lora")],
)
def test_variational_loss(request: pytest.FixtureRequest, model_name: str, mode: str, weight: float) -> None:
    golden = request.getfixturevalue(model_name)
    checkpoint = golden.checkpoint(lite="lite" in mode or "lora" in mode)
    model = from_official_checkpoint(golden.base_model(), checkpoint, variational_weight=weight).train()
    if model_name == "llama":
        model(**llama_inputs(golden))
    else:
        model(golden.tensors["input/pixel_values"].double())
    assert_close(model.variational_loss(), golden.tensors[f"{mode}/var_loss"])


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize("model_name", ["vit", "convnext", "llama"])
def test_gradient_of_the_transform(request: pytest.FixtureRequest, model_name: str) -> None:
    golden = request.getfixturevalue(model_name)
    model = from_official_checkpoint(golden.base_model(), golden.checkpoint(lite=False), trainable_parts=["transform"])
    if model_name != "llama":
        loss = model(golden.tensors["input/pixel_values"].double(), labels=golden.tensors["input/labels"]).loss
        expected = golden.tensors["toast/extra_grad/enc.top_down_transform"]
    else:
        loss = cross_entropy(model(**llama_inputs(golden)).logits, golden.tensors["input/labels"])
        expected = golden.tensors["full/extra_grad/model.top_down_transform"]
    loss.backward()
    [transform] = [parameter for name, parameter in trained(model).items() if name.endswith("top_down_transform")]
    assert_close(transform.grad, expected)


@pytest.mark.usefixtures("rms_norm_in_float64")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompts", ["gen", "gen_leftpad"])
@pytest.mark.parametrize(("name", "mode"), LLAMA_MODES)
def test_llama_greedy_decoding(llama: Golden, name: str, mode: str, prompts: str, use_cache: bool) -> None:
    model = llama_model(llama, name, mode).eval()
    input_ids = llama.tensors[f"input/{prompts}_input_ids"]
    attention_mask = llama.tensors.get(f"input/{prompts}_attention_mask", torch.ones_like(input_ids))
    # generate() returns the logits in float32; take them from the head, in float64.
    logits = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
    )
    assert torch.equal(sequences, llama.tensors[f"{name}/{mode}/{prompts}/sequences"])
    assert_close(torch.stack(logits, 1), llama.tensors[f"{name}/{mode}/{prompts}/logits"])

"""What must hold on a GPU as on a CPU: each test runs on both where there is a GPU, and on the CPU alone where not.

Models are made on the CPU, so that their weights are the same everywhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from toast_peft import (
    FeedbackCallback,
    TopDownConfig,
    draft_with_first_pass,
    explain,
    fit_gate,
    initialize_feedback,
    prompt_from,
    store_features,
)

from ..helpers import (
    CACHE,
    adapted,
    assert_same,
    assert_same_gradients,
    blocks_of,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steered,
    value_projections_of,
)
from ..zoo import HIDDEN_SIZE, VARIANTS, VIT_AND_LLAMA, VOCAB_SIZE, tiny_model
from ..zoo import inputs_of as inputs_on_cpu
from . import test_initialization, test_stored_features
from .test_closed_rows import open_only
from .test_compile import BACKEND
from .test_fused_feedback import assert_fused_gives_the_same, recorded_values
from .test_fused_feedback import exact as in_float64
from .test_gate import closed, gated
from .test_gate_fitting import REFERENCE, TARGET, gate_of
from .test_mixed_batches import NAMES, assert_each_row_is_that_of_its_adapter, generated
from .test_mixed_precision import mixed_model
from .test_offload import AFTER_BLOCKS, is_offloaded, place
from .test_several_adapters import activate, feedback_alone, with_adapters
from .test_shared_cache import assert_same_numbers, generate, open_from
from .test_trainer import dataset_for, new_model, trainer_for

VIT, LLAMA = tf.ViTForImageClassification, tf.LlamaForCausalLM
FAMILIES = [
    *VIT_AND_LLAMA,
    tf.GPT2LMHeadModel,
    tf.BertForSequenceClassification,
    tf.T5ForConditionalGeneration,
    tf.ConvNextForImageClassification,
    tf.SwinForImageClassification,
]
# MPS has no float64, in which most is compared.
ACCELERATORS = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
DEVICES = ["cpu", *(kind for kind in ACCELERATORS if kind != "mps")]
PRECISIONS = [torch.float32, torch.bfloat16]
STATIC = {"cache_implementation": "static"}
EAGER = {"disable_compile": True}  # on accelerators `generate` compiles forwards with a static cache by itself
CHANGES = {"pass2_target_modules": "all-linear", "pass2_r": 2, "pass2_bias": "all"}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def norms_of_llama_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes them in float32 for all; a GPU rounds these sums otherwise when a batch has other rows."""
    in_float32 = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return in_float32(self, x)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def inputs_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Its inputs, where it is and in its dtype."""
    return on_device_of(model, inputs_on_cpu(model, **options))


def on_device_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def without_cache(model: nn.Module, **options: Any) -> dict[str, Any]:
    return inputs_of(model, **options) | ({"use_cache": False} if model.can_generate() else {})


def assert_same_in_float32(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of another device or compiled: some norms, and all rotary embeddings, compute in float32 by other kernels."""
    assert_same(found.cpu().float(), expected.cpu().float())


def is_on(device: str, model: nn.Module) -> bool:
    return {tensor.device.type for tensor in model.state_dict().values()} == {device}


# ------------------------------------------------------------------------------------------------------------ forwards


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_new_adapter_is_the_base_model(model_class: type, dtype: torch.dtype, device: str) -> None:
    base = tiny_model(model_class).to(device, dtype)
    inputs = inputs_of(base)
    expected = output_of(base, inputs)
    model = adapted(base, **CHANGES)
    assert is_on(device, model)
    assert torch.equal(output_of(model, inputs), expected)


def test_new_adapter_draws_the_dropout_of_the_base_model(device: str) -> None:
    """Pass 1 uses up no random numbers, on no device."""
    base = tiny_model(VIT, hidden_dropout_prob=0.3).to(device).train()
    outputs = []
    for model in (base, adapted(base)):
        torch.manual_seed(3)
        outputs.append(output_of(model, inputs_of(model)))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], output_of(base, inputs_of(base)))


@pytest.mark.parametrize("model_class", FAMILIES)
def test_output_and_gradients_are_those_on_the_cpu(model_class: type, device: str) -> None:
    model = steered(tiny_model(model_class)).double()
    expected = output_of(model, inputs_of(model))
    loss_of(model, inputs_of(model)).backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    model.to(device)
    assert_same_in_float32(output_of(model, inputs_of(model)), expected)
    loss_of(model, inputs_of(model)).backward()
    assert_same_gradients({name: gradient.cpu() for name, gradient in gradients(model).items()}, expected_gradients)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_gate_gives_the_base_model(model_class: type, dtype: torch.dtype, skips: bool, device: str) -> None:
    model = gated(model_class, skip_closed_rows=skips, **CHANGES).to(device, dtype)
    inputs = without_cache(model)
    with model.disable_adapter():
        expected = output_of(model, inputs)
    with closed(model):
        assert torch.equal(output_of(model, inputs), expected)
    assert not torch.allclose(output_of(model, inputs), expected)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_row_beside_open_ones_is_the_base_model(
    model_class: type, dtype: torch.dtype, skips: bool, device: str
) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=skips).to(device, dtype)
    inputs = without_cache(model, batch_size=4)
    with model.disable_adapter():
        expected = output_of(model, inputs)
    with open_only(model, [True, False, True, False]):
        found = output_of(model, inputs)
    assert torch.equal(found[1::2], expected[1::2])
    assert not torch.isclose(found[::2], expected[::2]).flatten(1).all(1).any()


@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, tf.SwinForImageClassification])
def test_row_of_a_mixed_batch_is_that_of_its_adapter(model_class: type, device: str) -> None:
    model = with_adapters(model_class).to(device)
    assert_each_row_is_that_of_its_adapter(model, inputs_of(model, batch_size=6))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_two_active_adapters_add_up(model_class: type, device: str) -> None:
    model = with_adapters(model_class).to(device)
    inputs = inputs_of(model)
    alone = [feedback_alone(model, name, inputs)[0] for name in ("default", "late")]
    base = tiny_model(model_class).to(device, torch.float64)
    for index, projection in enumerate(value_projections_of(base)):
        td = sum(of_adapter[index] for of_adapter in alone if index in of_adapter)
        projection.register_forward_pre_hook(lambda module, args, td=td: (args[0] + td,))
    activate(model, "default", "late")
    assert_same(output_of(model, inputs), output_of(base, inputs))


@pytest.mark.parametrize("variant", ["full", "lite"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_is_the_same(model_class: type, variant: str, device: str) -> None:
    assert_fused_gives_the_same(in_float64(model_class, **VARIANTS[variant]).to(device))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_has_the_precision_of_the_values(model_class: type, device: str) -> None:
    """Those of a model in bfloat16, with an adapter in float32."""
    model = mixed_model(model_class, torch.bfloat16, autocast_adapter=True).eval().to(device)
    inputs = inputs_of(model)
    expected = output_of(model, inputs)
    model.fuse_feedback()
    with recorded_values(model) as values:
        found = output_of(model, inputs)
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in paths_of(model)[0].fused.buffers()} == {torch.bfloat16}
    assert_same(found, expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_autocast(model_class: type, device: str) -> None:
    base = tiny_model(model_class).to(device)
    inputs = inputs_of(base)
    with torch.autocast(device, torch.bfloat16):
        expected = output_of(base, inputs)
        assert torch.equal(output_of(adapted(base), inputs), expected)
    model = steered(tiny_model(model_class)).to(device)
    expected = output_of(model, inputs)
    with torch.autocast(device, torch.bfloat16):
        found = output_of(model, inputs)
        loss = loss_of(model.train(), inputs)
    assert (found.float() - expected).abs().max() < 0.06 * expected.abs().max()
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("skips", [False, True])
def test_closed_generation_is_that_of_the_base_model(skips: bool, cache: dict[str, Any], device: str) -> None:
    model = gated(LLAMA, skip_closed_rows=skips).to(device, torch.float32)
    inputs = inputs_of(model)
    with model.disable_adapter():
        expected = generate(model, **inputs, **cache, **EAGER)
    with closed(model):
        found = generate(model, **inputs, **cache, **EAGER)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("skips", [False, True])
def test_closed_row_of_a_generation_is_that_of_the_base_model(skips: bool, device: str) -> None:
    model = steered(tiny_model(LLAMA), skip_closed_rows=skips).to(device)
    inputs = inputs_of(model)
    with model.disable_adapter():
        expected = generate(model, **inputs)
    with open_from(model, 2, slice(1, None)):
        found = generate(model, **inputs)
    assert torch.equal(found.sequences[0], expected.sequences[0])
    assert all(torch.equal(x[0], y[0]) for x, y in zip(found.logits, expected.logits, strict=True))
    assert not torch.allclose(found.logits[-1][1], expected.logits[-1][1])


@pytest.mark.parametrize("cache_class", [tf.DynamicCache, tf.StaticCache])
@pytest.mark.parametrize("variant", ["full", "middle"])
def test_cached_is_recomputed(variant: str, cache_class: type, device: str) -> None:
    model = gated(LLAMA, **VARIANTS[variant]).to(device)
    ids = inputs_of(model)["input_ids"]
    options = {"max_cache_len": 16} if cache_class is tf.StaticCache else {}
    cache = cache_class(config=model.config, **options)
    found = [output_of(model, {"input_ids": part, CACHE: cache}) for part in ids.split([4, 3, 1, 1], dim=1)]
    assert_same(torch.cat(found, dim=1), output_of(model, {"input_ids": ids, "use_cache": False}))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, STATIC | EAGER], ids=str)
@pytest.mark.parametrize("skips", [False, True])
def test_cached_generation_is_recomputed(skips: bool, options: dict[str, Any], device: str) -> None:
    """With a gate, which keeps a sum of what was before."""
    model = gated(LLAMA, skip_closed_rows=skips).to(device)
    inputs = inputs_of(model)
    of_beams = {name: value for name, value in options.items() if name.startswith("num_")}
    assert_same_numbers(generate(model, **inputs, **options), generate(model, **inputs, **of_beams, use_cache=False))


def test_mixed_batch_generates_what_each_row_generates(device: str) -> None:
    model = with_adapters(LLAMA).to(device)
    inputs = inputs_of(model, batch_size=6)
    found = generated(model, inputs, adapter_names=NAMES)
    for row in (0, 2, 4):
        activate(model, NAMES[row])
        assert torch.equal(generated(model, {"input_ids": inputs["input_ids"][row : row + 1]})[0], found[row])


@pytest.mark.parametrize("options", [{}, STATIC | EAGER], ids=["dynamic", "static"])
def test_drafts_of_pass_1_change_no_token(options: dict[str, Any], device: str) -> None:
    model = steered(tiny_model(LLAMA), task_type="CAUSAL_LM").to(device, torch.float64)
    inputs = inputs_of(model, batch_size=1) | {"max_new_tokens": 12, "do_sample": False} | options
    expected = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, custom_generate=draft_with_first_pass), expected)


# ------------------------------------------------------------------------------------------- data, gates and pictures


def test_initialised_as_on_the_cpu(device: str) -> None:
    """From batches on the CPU, as a dataloader gives them."""
    models = [adapted(tiny_model(VIT)).double() for _ in range(2)]
    batches = [on_device_of(models[0], batch) for batch in test_initialization.batches(models[0])]
    for model in (models[0], models[1].to(device)):
        initialize_feedback(model, batches)
    assert is_on(device, models[1])
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name).cpu(), parameter, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_gate_is_fitted_as_on_the_cpu(kind: str, device: str) -> None:
    models = [steered(tiny_model(LLAMA)).double(), steered(tiny_model(LLAMA)).to(device, torch.float64)]
    reports = [fit_gate(model, TARGET, REFERENCE, gate=kind) for model in models]
    assert reports[1] == pytest.approx(reports[0], abs=0.02)
    assert is_on(device, models[1])
    for name, parameter in gate_of(models[0]).named_parameters():
        found = gate_of(models[1]).get_parameter(name).cpu()
        torch.testing.assert_close(found, parameter.data, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_gate_against_what_the_base_model_writes_leaves_the_random_numbers(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toast_peft.gate_fitting._GENERATED", (8, 16))
    model = steered(tiny_model(LLAMA), gate="sequence").to(device)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    report = fit_gate(model, TARGET, "generate")
    assert torch.equal(torch.rand(3, device=device), expected)
    assert 0 <= report["open_reference"] < 0.5


@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_stored_features_give_the_same(model_class: type, variant: str, device: str, tmp_path: Path) -> None:
    """Rows, files and batches are on the CPU, and the Trainer moves the batches."""
    model = test_stored_features.exact_model(model_class, **VARIANTS[variant]).to(device)
    rows = test_stored_features.rows_of(model)
    if model_class is LLAMA:  # padded
        rows = [row | {"attention_mask": (torch.arange(9) < 9 - i).long()} for i, row in enumerate(rows)]
        rows = [row | {"labels": row["input_ids"].where(row["attention_mask"] == 1, -100)} for row in rows]
    stored = test_stored_features.all_of(store_features(model, rows, tmp_path, batch_size=4))
    assert {x.device.type for x in stored.values()} == {"cpu"}
    batch = on_device_of(model, stored)
    found, expected = (
        test_stored_features.loss_and_gradients(model, b) for b in (batch, test_stored_features.without(batch))
    )
    test_stored_features.assert_exact(found, expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_explanation_is_that_on_the_cpu(model_class: type, device: str) -> None:
    model = gated(model_class)
    expected = explain(model, without_cache(model))
    model.to(device)
    found = explain(model, without_cache(model))
    for one, other in zip(arrays_of(found), arrays_of(expected), strict=True):
        assert type(one) is np.ndarray and one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert "<html" in found.to_html()


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_explanation_is_drawn(model_class: type, device: str) -> None:
    model = gated(model_class).to(device)
    explain(model, without_cache(model)).plot().canvas.draw()


def arrays_of(explanation: Any) -> list[np.ndarray]:
    passes = [array for p in (explanation.first, explanation.second) for array in (p.logits, *p.attentions)]
    others = [explanation.mask, explanation.gate, explanation.features, explanation.swapped_logits]
    return [*passes, *others, *explanation.feedback_norm.values()]


# ------------------------------------------------------------------------------------------------------- given prompts


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_given_prompts_act_as_on_the_cpu(model_class: type, device: str) -> None:
    model, results = steered(tiny_model(model_class)).double(), []
    for where in ("cpu", device):
        model.to(where)
        inputs = inputs_of(model)
        prompts = prompt_from(model, inputs_on_cpu(model), tokens=[2])
        assert prompts.device.type == where
        results.append((prompts.cpu(), output_of(model, inputs | {"topdown_prompt": prompts}).cpu()))
    for expected, found in zip(*results, strict=True):
        assert_same_in_float32(found, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_prompt_on_another_device_is_refused(fused: bool, device: str) -> None:
    model = steered(tiny_model(VIT)).to(device)
    if fused:
        model.fuse_feedback()
    inputs = inputs_of(model)
    expected = output_of(model, inputs)
    prompt = torch.ones(HIDDEN_SIZE, device="meta" if device == "cpu" else "cpu")
    with pytest.raises(ValueError, match="move it to where the model's inputs are"):
        output_of(model, inputs | {"topdown_prompt": prompt})
    with pytest.raises(ValueError, match="move it to where the model's inputs are"), model.prompted(prompt):
        output_of(model, inputs)
    assert torch.equal(output_of(model, inputs), expected)


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token for each word, as many as the tiny models have."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *(f"w{index}" for index in range(len(special), VOCAB_SIZE))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {f"{word[1:4]}_token": word for word in special}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, padding_side="left")


def test_pipeline_of_texts_takes_a_prompt(device: str) -> None:
    """As an argument, which it hands on to `generate`, and in a `with` block."""
    model = steered(tiny_model(LLAMA), task_type="CAUSAL_LM").to(torch.float64)
    pipe = tf.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device=device)
    assert is_on(device, model)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    request = prompt_from(model, inputs_on_cpu(model)).mean(0) * torch.linspace(-1, 1, HIDDEN_SIZE, device=device)
    text = "w5 w6 w7 w8"
    [found] = pipe(text, topdown_prompt=request, **options)
    ids = torch.tensor([[5, 6, 7, 8]], device=device)
    expected = model.generate(input_ids=ids, topdown_prompt=request, max_new_tokens=8, do_sample=False)[0, 4:]
    assert found["generated_text"].split() == tiny_tokenizer().decode(expected, skip_special_tokens=True).split()
    with model.prompted(request):
        assert pipe(text, **options) == [found]
    assert pipe(text, **options) != [found]


def test_pipeline_of_images_takes_a_prompt(device: str) -> None:
    """In a `with` block, as it has no arguments to hand on to the model."""
    model = steered(tiny_model(VIT))
    processor = tf.ViTImageProcessorPil(size={"height": 8, "width": 8})
    pipe = tf.pipeline("image-classification", model=model, image_processor=processor, device=device)
    assert is_on(device, model)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in pixels]
    inputs = processor(images, return_tensors="pt").to(device)
    requests = prompt_from(model, inputs)
    expected = F.softmax(output_of(model, {**inputs, "topdown_prompt": requests}), dim=-1)
    with model.prompted(requests):
        found = pipe(images, batch_size=2)
    learned = pipe(images, batch_size=2)
    for row, scores in enumerate(found):
        by_label = {score["label"]: score["score"] for score in scores}
        assert [by_label[f"LABEL_{i}"] for i in range(2)] == pytest.approx(expected[row].tolist(), abs=1e-5)
        assert scores[0]["score"] != pytest.approx(learned[row][0]["score"], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_trainer_with_bfloat16_trains_all_of_it(model_class: type, device: str, tmp_path: Path) -> None:
    model = new_model(model_class, gate="token", feedback_to_output=model_class is LLAMA, **CHANGES).to(device)
    data = dataset_for(model_class)
    batches = [{name: x for name, x in data[:16].items() if name != "labels"}]
    fit_gate(model, batches, [{name: x.flip(-1) for name, x in batch.items()} for batch in batches], quantile=0.2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = trainer_for(
        model, tmp_path, bf16=True, max_steps=6, eval_strategy="no", save_strategy="no", logging_steps=1,
        use_cpu=device == "cpu",
    )  # fmt: skip
    trainer.add_callback(FeedbackCallback(trainer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and np.isfinite(losses).all()
    trained = dict(model.named_parameters())
    assert {trained[name].dtype for name in before} == {torch.float32} and is_on(device, model)
    assert [name for name, start in before.items() if torch.equal(trained[name], start)] == []


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_gives_the_same_gradients(model_class: type, use_reentrant: bool, device: str) -> None:
    """With dropout, whose random numbers the recomputation draws again."""
    dropout = "hidden_dropout_prob" if model_class is VIT else "attention_dropout"
    results = []
    for checkpointing in (False, True):
        model = steered(tiny_model(model_class, **{dropout: 0.2}), **CHANGES).to(device, torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        loss_of(model, inputs_of(model)).backward()
        results.append(gradients(model))
    assert_same_gradients(*results)


# ------------------------------------------------------------------------------------------------------ saving, moving


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_saved_and_loaded_gives_the_same(model_class: type, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """Also on the CPU beside an accelerator, onto which PEFT would load the weights."""
    model = mixed_model(model_class, dtype, autocast_adapter=True, r=4, **CHANGES).eval().to(device)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class).to(device, dtype), tmp_path)
    assert is_on(device, loaded)
    inputs = inputs_of(model)
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    with model.disable_adapter():
        assert not torch.allclose(output_of(loaded, inputs), output_of(model, inputs))


def test_adapter_moves_with_its_model(device: str) -> None:
    model = steered(tiny_model(VIT), gate="token", **CHANGES)
    expected = output_of(model)
    model.to(device)
    model.add_adapter("other", TopDownConfig(r=4, gate="sequence", **CHANGES))
    assert is_on(device, model)
    output_of(model, inputs_of(model))
    model.set_adapter("other")
    output_of(model, inputs_of(model))
    model.set_adapter("default")
    model.to("cpu")
    assert is_on("cpu", model)
    assert_same(output_of(model), expected)


def offloaded(model: nn.Module, device: str) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device(device))


def dispatched(model: nn.Module, device: str) -> nn.Module:
    """The upper two blocks on the CPU, from where they are fetched, all others on the device."""
    blocks = blocks_of(model)
    inside = {part for block in blocks for part in block.modules()}
    device_map = {name: device for name, part in model.named_modules() if part._parameters and part not in inside}
    for name, part in model.named_modules():
        if part in blocks:
            device_map[name] = "cpu" if part in blocks[2:] else device
    return dispatch_model(model, device_map, main_device=device, force_hooks=True)


def with_weights_of(reference: PeftModel, base: nn.Module, **options: Any) -> PeftModel:
    model = adapted(base, **options)
    weights = {name: x for name, x in reference.state_dict().items() if "topdown_" in name}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("offload", [offloaded, dispatched])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_offloaded_base_model(model_class: type, offload: Callable, device: str) -> None:
    reference = steered(tiny_model(model_class)).double()
    inputs = inputs_of(reference)
    base = offload(tiny_model(model_class).double(), device)
    assert is_offloaded(blocks_of(base)[-1]) or (device == "cpu" and offload is dispatched)
    model = with_weights_of(reference, base)
    assert_same_in_float32(output_of(model, inputs), output_of(reference, inputs))


@pytest.mark.parametrize("variant", ["full", "lite", "middle"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_model_split_over_two_devices(model_class: type, variant: str, device: str) -> None:
    reference = steered(tiny_model(model_class), **VARIANTS[variant]).double()
    base = tiny_model(model_class).double()
    place("cpu", *blocks_of(base)[:2])
    place(device, *blocks_of(base)[2:], *(module for name, module in base.named_modules() if name in AFTER_BLOCKS))
    model = with_weights_of(reference, base, **VARIANTS[variant])
    inputs = inputs_of(reference)
    assert_same_in_float32(output_of(model, inputs), output_of(reference, inputs))
    for trained in (model, reference):
        loss_of(trained, inputs).backward()
    assert_same_gradients({name: x.cpu() for name, x in gradients(model).items()}, gradients(reference))


# ----------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_compiled_forward(model_class: type, device: str) -> None:
    torch.compiler.reset()
    size = {"num_hidden_layers": 2, "problem_type": "single_label_classification"}
    model = steered(tiny_model(model_class, **size)).to(device, torch.float64)
    inputs = without_cache(model)
    expected = output_of(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else BACKEND)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert_same_in_float32(output_of(compiled, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("skips", "drafted"), [(False, False), (True, False), (False, True)])
def test_generation_with_a_static_cache_that_is_compiled_where_generate_does_so(
    skips: bool, drafted: bool, device: str
) -> None:
    """On an accelerator, with CUDA graphs there."""
    torch.compiler.reset()
    options = {"skip_closed_rows": skips, "task_type": "CAUSAL_LM"}
    model = (in_float64(LLAMA, **options) if drafted else gated(LLAMA, **options)).to(device)
    inputs = inputs_of(model, batch_size=1) | {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, use_cache=False)
    how = {"custom_generate": draft_with_first_pass} if drafted else {}
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **STATIC, **how), expected)

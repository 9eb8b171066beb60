"""What must hold on a GPU as on a CPU: generation, and prompts that are given."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn import functional as F

from toast_peft import (
    draft_with_first_pass,
    prompt_from,
)

from ..helpers import (
    CACHE,
    assert_same,
    output_of,
    steered,
)
from ..zoo import HIDDEN_SIZE, VARIANTS, VIT_AND_LLAMA, VOCAB_SIZE, tiny_model
from ..zoo import inputs_of as inputs_on_cpu
from .accelerators import LLAMA, VIT, assert_same_in_float32, inputs_of, is_on
from .test_fused_feedback import exact as in_float64
from .test_gate import closed, gated
from .test_mixed_batches import NAMES, generated
from .test_several_adapters import activate, with_adapters
from .test_shared_cache import assert_same_numbers, generate, open_from

STATIC = {"cache_implementation": "static"}
EAGER = {"disable_compile": True}  # on accelerators `generate` compiles forwards with a static cache by itself


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

"""Both passes side by side generate what they generate one after the other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch.nn import functional as F
from transformers import DynamicCache

from toast_peft import draft_with_first_pass
from toast_peft.drafting import SideBySide

from ..helpers import CACHE, adapted, output_of, steered
from ..zoo import DECODERS, VARIANTS, inputs_of, tiny_model
from .test_gate import gated

NEW_TOKENS = 12
STATIC = {"cache_implementation": "static"}
PADDED = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
ONE_TOKEN = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}


def exact(model_class: type = tf.LlamaForCausalLM, size: dict[str, int] | None = None, **options: Any) -> PeftModel:
    """A steered model in float64, so that rounding chooses no token."""
    model = tiny_model(model_class, **size or {}).double()
    return steered(model, task_type="CAUSAL_LM", **options).double()


def generate(model: PeftModel, drafted: bool, **options: Any) -> torch.Tensor:
    if drafted:
        options["custom_generate"] = draft_with_first_pass
    inputs = inputs_of(model, batch_size=1, length=6) | {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    torch.manual_seed(0)
    return model.generate(**inputs)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The tokens of pass 1, of each forward of two rows."""
    tokens: list[torch.Tensor] = []
    step = SideBySide._step
    monkeypatch.setattr(SideBySide, "_step", lambda self, token: (tokens.append(token), step(self, token))[1])
    yield tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", DECODERS)
def test_same_tokens(model_class: type, variant: str) -> None:
    model = exact(model_class, **VARIANTS[variant])
    expected = generate(model, drafted=False)
    assert torch.equal(generate(model, drafted=True), expected)
    with model.disable_adapter():
        assert not torch.equal(generate(model, drafted=False), expected)


@pytest.mark.parametrize(
    "options",
    [
        STATIC,
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.5, **STATIC},
        {"repetition_penalty": 3.0},
        {"eos_token_id": list(range(1, 60, 3)), "pad_token_id": 0},
        {"max_new_tokens": 1},
        ONE_TOKEN,
        PADDED,
        {CACHE: DynamicCache},
    ],
    ids=str,
)
def test_same_tokens_with_options_of_generate(options: dict[str, Any]) -> None:
    model = exact()
    made = [{name: value() if isinstance(value, type) else value for name, value in options.items()} for _ in range(2)]
    assert torch.equal(generate(model, drafted=True, **made[0]), generate(model, drafted=False, **made[1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_with_fused_feedback(variant: str) -> None:
    model = exact(**VARIANTS[variant])
    expected = generate(model, drafted=False)
    model.fuse_feedback()
    assert torch.equal(generate(model, drafted=True), expected)


LORA = {"pass2_target_modules": "all-linear", "pass2_bias": "all"}
ADDED: dict[str, dict[str, Any]] = {
    "token gate": {"gate": "token"},
    "sequence gate": {"gate": "sequence"},
    "output": {"feedback_to_output": True},
    "LoRA": LORA,
    "LoRA alone": {**LORA, "trainable_parts": ["pass2"], "gate": "sequence"},
    "all": {**LORA, "feedback_to_output": True, "gate": "sequence", "feedback_from": 2, "feedback_to": 1, "r": 4},
}


def with_added(added: str, model_class: type = tf.LlamaForCausalLM, **options: Any) -> PeftModel:
    """A model whose pass 2 adds more than feedback, or not everywhere."""
    make = gated if "gate" in ADDED[added] else exact
    return make(model_class, **ADDED[added], **options, **({"task_type": "CAUSAL_LM"} if make is gated else {}))


@pytest.mark.parametrize("options", [{}, STATIC, PADDED, ONE_TOKEN], ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_same_logits_with_all_that_pass_2_may_add(
    added: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_added(added)
    logits: list[torch.Tensor] = []
    step = SideBySide.step
    monkeypatch.setattr(SideBySide, "step", lambda self, draft: (logits.append(step(self, draft)), logits[-1])[1])
    sequence = generate(model, drafted=True, **options)
    assert torch.equal(sequence, generate(model, drafted=False, **options))
    mask = F.pad(options.get("attention_mask", torch.ones(1, len(sequence[0]) - NEW_TOKENS)), (0, NEW_TOKENS), value=1)
    inputs = {"input_ids": sequence, "attention_mask": mask.long(), "use_cache": False}
    positions = (mask.cumsum(-1) - 1).clamp(min=0).long()
    inputs["position_ids"] = positions
    expected = output_of(model, inputs)[0, -NEW_TOKENS:-1]
    if options in ({}, STATIC):  # after other prompts the adapter may change nothing
        with model.disable_adapter():
            assert (output_of(model, inputs)[0, -NEW_TOKENS:-1] - expected).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat(logits), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_class", DECODERS)
def test_same_tokens_with_all_that_pass_2_may_add(model_class: type) -> None:
    model = with_added("all", model_class)
    assert torch.equal(generate(model, drafted=True), generate(model, drafted=False))


@pytest.mark.slow
@pytest.mark.parametrize("added", ["none", "all"])
def test_compiled_once_with_a_static_cache(added: str) -> None:
    # With all added the first of three blocks runs in pass 1 only and the last in pass 2 only.
    size = {"num_hidden_layers": 2 if added == "none" else 3}
    model = exact(size=size) if added == "none" else with_added(added, size=size)
    expected = generate(model, drafted=False)
    compiled = tf.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # by default generation compiles on GPUs only
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert torch.equal(generate(model, drafted=True, **STATIC, compile_config=compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_step_for_a_token_whose_draft_holds(steps: list[torch.Tensor]) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM).double(), task_type="CAUSAL_LM").double()
    sequence = generate(model, drafted=True)
    # Pass 1 of the first new token, which comes from the prompt, and then of a draft for each.
    assert torch.equal(torch.cat(steps, dim=-1), sequence[:, 6:])
    assert torch.equal(sequence, generate(model, drafted=False))


def test_two_steps_for_the_others(steps: list[torch.Tensor]) -> None:
    model = exact()
    sequence = generate(model, drafted=True)
    with model.disable_adapter():
        drafts = output_of(model, {"input_ids": sequence, "use_cache": False}).argmax(-1)
    wrong = (drafts[:, 6:-1] != sequence[:, 7:]).sum()
    assert 0 < wrong < NEW_TOKENS
    # After the last token no step is needed.
    assert len(steps) == NEW_TOKENS + int(wrong) - int(drafts[0, -2] != sequence[0, -1])


class Failure(Exception):
    pass


def test_an_error_leaves_nothing_behind() -> None:
    model = exact()
    expected = generate(model, drafted=False)

    def fail(*args: Any) -> None:
        raise Failure

    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(Failure):
        generate(model, drafted=True)
    handle.remove()
    assert torch.equal(generate(model, drafted=False), expected)


# ------------------------------------------------------------------------------------------------------------ refused


def with_used_cache(model: PeftModel) -> dict[str, Any]:
    cache = DynamicCache(config=model.config)
    model(**inputs_of(model, batch_size=1, length=3), **{CACHE: cache})
    return {CACHE: cache}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "got 2 sequences and num_beams=1; expected one sequence"),
        ({"num_beams": 2}, "num_beams=2; expected one sequence and no beam search"),
        ({"return_dict_in_generate": True}, "returns the tokens only, and return_dict_in_generate=True asks for more"),
        (with_used_cache, "got a DynamicCache with 3 tokens in it; expected a new DynamicCache or StaticCache"),
    ],
    ids=["sequences", "beams", "dictionary", "used cache"],
)
def test_options_that_are_refused(options: Any, message: str) -> None:
    model = exact()
    options = options(model) if callable(options) else options
    with pytest.raises(ValueError, match=message):
        generate(model, drafted=True, **options)


def test_refused_without_an_active_adapter() -> None:
    model = exact()
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="found 0 backbones with an active TOAST adapter; expected one"),
    ):
        generate(model, drafted=True)


@pytest.mark.parametrize(
    ("model_class", "options", "message"),
    [
        (
            tf.T5ForConditionalGeneration,
            {"target_modules": r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.v"},
            "does not support T5ForConditionalGeneration, which is an encoder-decoder",
        ),
        (tf.Qwen2_5_VLForConditionalGeneration, {}, "gives each token . positions"),
        (
            tf.LlamaForCausalLM,
            {"double_value_bias": True},
            r"which adds biases twice in pass 2 \(`double_value_bias`\)",
        ),
    ],
)
def test_models_that_are_refused(model_class: type, options: dict[str, Any], message: str) -> None:
    model = steered(tiny_model(model_class), **options)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 3}
    with pytest.raises(NotImplementedError, match=message):
        model.generate(**inputs, custom_generate=draft_with_first_pass)


def test_a_static_window_is_refused() -> None:
    model = exact(tf.Gemma3ForCausalLM)
    with pytest.raises(NotImplementedError, match="has a cache of StaticSlidingWindowLayer; leave out"):
        generate(model, drafted=True, **STATIC)

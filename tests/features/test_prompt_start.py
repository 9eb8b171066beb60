"""A new adapter's prompt lets tokens through from the start, wherever the base model can run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig, feedback_statistics, initialize_feedback

from ..helpers import adapted, blocks_of, counted_block_calls, features_of, output_of, paths_of
from ..zoo import HIDDEN_SIZE, NUM_BLOCKS, VIT_AND_LLAMA, ZOO, inputs_of, tiny_model, variant_of, with_variants
from .test_wiring import Block

RANDOM_SENTENCE = "starts at random"


def prompts_of(model: nn.Module, name: str = "default") -> torch.Tensor:
    return torch.stack([path.selection.topdown_prompt[name].weight.detach() for path in paths_of(model)])


@contextmanager
def no_sentence() -> Iterator[None]:
    """It is an error to fall back to a random prompt."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{RANDOM_SENTENCE}")
        yield


@contextmanager
def counted_forwards(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The calls of the first block."""
    calls: list[nn.Module] = []
    with blocks_of(model)[0].register_forward_pre_hook(lambda module, args: calls.append(module)):
        yield calls


def narrow(model_class: type) -> nn.Module:
    """A model whose features share a direction, as those of trained models do."""
    base = tiny_model(model_class)
    with torch.no_grad():
        if model_class is tf.LlamaForCausalLM:
            base.model.embed_tokens.weight.add_(5 * torch.randn(HIDDEN_SIZE))
        else:
            base.vit.layernorm.bias.add_(5 * torch.randn(HIDDEN_SIZE))
    return base


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ZOO, ["full", "early"]))
def test_every_supported_model_runs_by_itself(model_class: type, variant: str) -> None:
    """From its weights alone, each path of it gets a prompt, with entries that are neither small nor large."""
    with no_sentence():
        prompts = prompts_of(adapted(tiny_model(model_class), **variant_of(model_class, variant)))
    torch.testing.assert_close(prompts.square().mean(1).sqrt(), torch.full((len(prompts),), 0.3))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_all_processes_start_from_the_same_prompt(model_class: type) -> None:
    prompts = []
    for seed in (1, 2):
        base = tiny_model(model_class)
        torch.manual_seed(seed)
        prompts.append(prompts_of(adapted(base)))
    assert torch.equal(*prompts)


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_all_tokens_are_open_where_random_prompts_are_closed(model_class: type, r: int) -> None:
    shares: dict[str, list[float]] = {"features": [], "random": []}
    for init_prompt, found in shares.items():
        for seed in range(6):
            base = narrow(model_class)
            expected = output_of(base)
            torch.manual_seed(seed)
            model = adapted(base, r=r, init_prompt=init_prompt)
            assert torch.equal(output_of(model), expected)
            found.append(feedback_statistics(model)["open_tokens"])
    assert min(shares["features"]) == 1.0
    assert min(shares["random"]) < 0.05


@pytest.mark.parametrize("options", [{}, {"feedback_from": 2}], ids=["all", "early"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_prompt_is_the_mean_feature_of_the_random_inputs(
    model_class: type, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(model_class)
    inputs = inputs_of(base)
    expected = F.normalize(features_of(base, inputs, options.get("feedback_from", 4)).detach(), dim=-1).mean((0, 1))
    monkeypatch.setattr("toast_peft.prompt_start.random_inputs", lambda model: inputs)
    prompt = prompts_of(adapted(base, **options))[0]
    torch.testing.assert_close(F.normalize(prompt, dim=0), F.normalize(expected, dim=0))


@pytest.mark.parametrize("options", [{}, {"feedback_from": 2}, {"feedback_to": 2}], ids=["all", "early", "late"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_one_pass_is_enough(model_class: type, options: dict) -> None:
    """At the start and in `initialize_feedback`, which need the features only; later forwards have both passes."""
    base = tiny_model(model_class)
    in_both_passes = options.get("feedback_from", NUM_BLOCKS) + NUM_BLOCKS - options.get("feedback_to", 0)
    with counted_block_calls(base) as calls:
        model = adapted(base, **options)
        assert calls == dict.fromkeys(range(NUM_BLOCKS), 1)
        initialize_feedback(model, [inputs_of(base)])
        assert calls == dict.fromkeys(range(NUM_BLOCKS), 2)
        output_of(model)
    assert calls.total() == 2 * NUM_BLOCKS + in_both_passes


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_nobody_elses_random_numbers_are_used(model_class: type) -> None:
    states = []
    for init_prompt in ("features", "random"):
        torch.manual_seed(3)
        base = tiny_model(model_class)
        states.append((adapted(base, r=2, init_prompt=init_prompt), torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    for (name, first), second in zip(states[0][0].named_parameters(), states[1][0].parameters(), strict=True):
        assert torch.equal(first, second) == ("topdown_prompt" not in name)


def test_random_option_is_todays_prompt_without_a_forward() -> None:
    base = tiny_model(tf.ViTModel)
    with counted_forwards(base) as calls:
        prompt = prompts_of(adapted(base, init_prompt="random"))
    assert not calls and 0.01 < prompt.std() < 0.03


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_official_prompt_keeps_its_distribution_up_to_the_sign(model_class: type) -> None:
    turned, shares = 0, []
    for seed in range(6):
        models = []
        for init_prompt in ("features", "random"):
            base = narrow(model_class)
            torch.manual_seed(seed)
            models.append(adapted(base, init_weights=False, init_prompt=init_prompt))
        chosen, drawn = map(prompts_of, models)
        assert torch.equal(chosen, drawn) or torch.equal(chosen, -drawn)
        turned += not torch.equal(chosen, drawn)
        base_output = output_of(narrow(model_class))
        assert (output_of(models[0]) - base_output).abs().max() > 1e-4
        shares.append(feedback_statistics(models[0])["open_tokens"])
    assert 0 < turned < 6
    assert min(shares) > 0 and sum(shares) / len(shares) > 0.5


@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.GPT2LMHeadModel, tf.GPTNeoXForCausalLM])
def test_official_prompt_opens_short_inputs_of_random_models(model_class: type) -> None:
    """Those of PEFT's own tests, which want to see an effect: the features of random weights share no direction."""
    inputs = {
        "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
    }
    for seed in range(8):
        base = tiny_model(model_class)
        torch.manual_seed(seed)
        model = adapted(base, init_weights=False)
        model(**inputs)
        assert feedback_statistics(model)["open_tokens"] > 0


def test_second_adapter_and_what_is_trained() -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM)).train()
    frozen = model.get_base_model().model.norm.eval()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("other", TopDownConfig(feedback_from=2))
    assert model.active_adapter == paths_of(model)[0].active_adapter == "default"
    assert model.training and not frozen.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    torch.testing.assert_close(prompts_of(model, "other").square().mean(), torch.tensor(0.09))
    assert not torch.allclose(prompts_of(model, "other"), prompts_of(model))
    model.disable_adapter_layers()
    model.add_adapter("third", TopDownConfig())
    assert torch.equal(prompts_of(model, "third"), prompts_of(model))
    assert paths_of(model)[0].active_adapter is None


def test_direct_injection_and_on_top_of_lora() -> None:
    expected = prompts_of(adapted(tiny_model(tf.LlamaForCausalLM)))
    model = inject_adapter_in_model(TopDownConfig(), tiny_model(tf.LlamaForCausalLM))
    assert torch.equal(prompts_of(model), expected)
    base = get_peft_model(tiny_model(tf.LlamaForCausalLM), LoraConfig(target_modules=["v_proj"])).get_base_model()
    torch.testing.assert_close(prompts_of(inject_adapter_in_model(TopDownConfig(), base)), expected)


def test_no_hook_is_left() -> None:
    base = tiny_model(tf.LlamaForCausalLM)
    with_start = adapted(base)
    without = adapted(tiny_model(tf.LlamaForCausalLM), init_prompt="random")
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        counts = [[len(getattr(m, kind)) for m in model.modules()] for model in (with_start, without)]
        assert counts[0] == counts[1]


def test_loading_runs_no_forward(tmp_path: Path) -> None:
    saved = adapted(tiny_model(tf.ViTModel))
    with torch.no_grad():
        paths_of(saved)[0].selection.topdown_prompt["default"].weight.normal_()
    saved.save_pretrained(tmp_path)
    for load in (
        lambda base: PeftModel.from_pretrained(base, tmp_path),
        lambda base: PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True),
        lambda base: adapted(base, pretrained_feedback=str(tmp_path)),
    ):
        base = tiny_model(tf.ViTModel)
        with counted_forwards(base) as calls:
            model = load(base)
        assert not calls and torch.equal(prompts_of(model), prompts_of(saved))


def test_loading_for_training_does_not_speak_of_random_prompts(tmp_path: Path) -> None:
    """It cannot be told from a new adapter with a saved config, which starts by a forward."""
    adapted(Blocks(), target_modules=["values"]).save_pretrained(tmp_path)
    with no_sentence():
        PeftModel.from_pretrained(Blocks(), tmp_path, is_trainable=True)


def test_offloaded_base(tmp_path: Path) -> None:
    """Its weights are on meta except while a module runs."""
    expected = prompts_of(adapted(tiny_model(tf.LlamaForCausalLM)))
    with no_sentence():
        assert torch.equal(prompts_of(adapted(cpu_offload(tiny_model(tf.LlamaForCausalLM)))), expected)


def test_bfloat16_base() -> None:
    with no_sentence():
        prompt = prompts_of(adapted(tiny_model(tf.ViTModel).to(torch.bfloat16)))
    assert prompt.dtype == torch.float32
    expected = prompts_of(adapted(tiny_model(tf.ViTModel)))
    assert F.cosine_similarity(prompt, expected) > 0.99


def test_adapter_on_meta_waits_for_its_weights() -> None:
    with no_sentence():
        model = get_peft_model(tiny_model(tf.ViTModel), TopDownConfig(), low_cpu_mem_usage=True)
        on_meta = adapted(tiny_model(tf.ViTModel).to("meta"))
    assert prompts_of(model).is_meta and prompts_of(on_meta).is_meta


class Blocks(nn.Module):
    """A module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class WithInputs(Blocks):
    """It says what its inputs are like, as models of transformers and diffusers do."""

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(1, 3, 8)}


def test_module_of_your_own_with_dummy_inputs() -> None:
    with no_sentence():
        model = adapted(WithInputs(), target_modules=["values"])
    model(torch.ones(1, 3, 8))
    assert feedback_statistics(model) == pytest.approx({"open_tokens": 1.0, "mean_mask": 1.0})


def with_nan() -> nn.Module:
    model = tiny_model(tf.ViTModel)
    model.layernorm.bias.data[0] = float("nan")
    return model


def sharded() -> nn.Module:
    """As after `fully_shard`, which needs a process group."""
    model = tiny_model(tf.ViTModel)

    model.layernorm.bias.__class__ = type("Sharded", (nn.Parameter,), {"ds_id": 0})
    return model


def with_other_inputs() -> nn.Module:
    return tiny_model(tf.Qwen2_5_VLForConditionalGeneration)


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (Blocks, {"target_modules": ["values"]}, "its inputs are not known"),
        (with_nan, {}, "its features are zero or not finite"),
        (sharded, {}, "its weights are sharded"),
        (with_other_inputs, {"target_modules": r".*visual.*attn\.qkv"}, "random inputs for .* are not known"),
    ],
    ids=["own module", "nan", "sharded", "patches"],
)
def test_one_sentence_where_the_model_cannot_run(build: Callable, options: dict[str, Any], reason: str) -> None:
    base = build()
    message = f"{RANDOM_SENTENCE}.*{reason}.*initialize_feedback.*init_prompt='random'"
    with pytest.warns(UserWarning, match=message) as w:
        model = adapted(base, **options)
    assert len([warning for warning in w if RANDOM_SENTENCE in str(warning.message)]) == 1
    prompts = prompts_of(model)
    assert 0.01 < prompts.std() < 0.03
    assert all(not path.selection.disable_adapters for path in paths_of(model))


def test_a_model_that_raises_is_as_it_was_and_has_its_adapter() -> None:
    base = tiny_model(tf.LlamaForCausalLM).train()

    def fail(*args: Any) -> None:
        raise ValueError("not today")

    with base.model.layers[2].register_forward_hook(fail), pytest.warns(UserWarning, match="not today"):
        model = adapted(base)
    assert model.training and all(module.training for module in model.modules())
    assert output_of(model.eval()).isfinite().all() and feedback_statistics(model)["open_tokens"] > 0


def test_swin_does_not_remember_the_image_of_the_start() -> None:
    """Its blocks keep the window of the smallest image that they have seen."""
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    model = tf.SwinModel(tf.SwinConfig(image_size=56, patch_size=4, window_size=7, **sizes)).eval()
    windows = [(block.window_size, block.shift_size) for layer in model.encoder.layers for block in layer.blocks]
    with no_sentence():
        adapted(model)
    assert windows == [
        (block.window_size, block.shift_size) for layer in model.encoder.layers for block in layer.blocks
    ]


def test_encoder_and_decoder_get_prompts_of_their_own() -> None:
    model = adapted(tiny_model(tf.T5ForConditionalGeneration))
    encoder, decoder = prompts_of(model)
    assert F.cosine_similarity(encoder, decoder, dim=0) < 0.9
    output_of(model)
    assert feedback_statistics(model)["decoder_open_tokens"] > 0.5


def test_encoder_of_sounds_and_decoder_of_text() -> None:
    with no_sentence():
        prompts = prompts_of(adapted(tiny_model(tf.WhisperForConditionalGeneration, max_source_positions=10)))
    torch.testing.assert_close(prompts.square().mean(1).sqrt(), torch.full((2,), 0.3))

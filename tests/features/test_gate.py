"""A gate leaves alone what the adapter is not for. How it is fitted is in `test_gate_fitting.py`."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache

from toast_peft import TopDownConfig, explain, feedback_statistics, store_features
from toast_peft.core.gate import Gate, Tokens, first_of_texts

from ..helpers import (
    CACHE,
    adapted,
    assert_same,
    assert_same_gradients,
    counted_block_calls,
    feedback_of,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steered,
)
from ..zoo import NUM_BLOCKS, RANGES, VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model, variant_of, with_variants
from .test_caches import COMPILED, compiles_static_caches  # noqa: F401  # a fixture
from .test_shared_cache import (
    BETWEEN,
    CONTINUED,
    DECODING,
    assert_equal_to_rounding,
    assert_same_numbers,
    generate,
    run_parts,
)

FAMILIES = [
    *VIT_AND_LLAMA,
    tf.BertForSequenceClassification,
    tf.GPT2LMHeadModel,
    tf.T5ForConditionalGeneration,
    tf.ConvNextForImageClassification,
    tf.ResNetForImageClassification,
    tf.SwinForImageClassification,
]
CAUSAL = [tf.LlamaForCausalLM, tf.GPT2LMHeadModel]


def gated(model_class: type, gate: str = "sequence", size: dict[str, int] | None = None, **options: Any) -> PeftModel:
    """A model in double precision, maybe of another size, whose adapter has a gate that is open for some tokens."""
    base = tiny_model(model_class, **size or {}).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs_of(base).items()}
    model = steered(base, inputs, gate=gate, **options).double()
    for index, path in enumerate(paths_of(model)):
        is_decoder = index == 1 or model_class in CAUSAL
        open_for_half(model, path, inputs, is_causal=is_decoder and gate == "sequence")
    return model


def open_for_half(
    model: nn.Module, path: nn.Module, inputs: dict[str, torch.Tensor], is_causal: bool, name: str = "default"
) -> None:
    """Set a gate between what it compares in some inputs."""
    gate = path.selection.topdown_gate[name]
    gate.set_causal(is_causal)
    compared: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        features, tokens = args
        compared.append(gate.compared(features, tokens))

    if gate.prior is not None:
        gate.prior.data.copy_(torch.linspace(-0.5, 0.5, len(gate.prior)))
    with gate.register_forward_pre_hook(keep):
        output_of(model, inputs)
    y = F.normalize(compared[0].flatten(0, -2), dim=-1)
    with torch.no_grad():
        gate.direction.copy_(y[0] - y.mean(0))
        scores = y @ F.normalize(gate.direction, dim=0)
        gate.threshold.fill_(scores.quantile(0.5))
        gate.width.fill_((scores.max() - scores.quantile(0.5)) * 0.7)


@contextmanager
def closed(model: nn.Module) -> Iterator[None]:
    """Close the gates for everything."""
    gates = [path.selection.topdown_gate["default"] for path in paths_of(model)]
    before = [gate.threshold.clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.threshold.fill_(2)
        yield
        for gate, threshold in zip(gates, before, strict=True):
            gate.threshold.copy_(threshold)


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Its inputs in its dtype, without a cache."""
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}
    return inputs | ({"use_cache": False} if model.can_generate() else {})


def gate_of(model: nn.Module) -> torch.Tensor:
    """How far it was open in the last forward; of several stacks that of the last one."""
    return paths_of(model)[-1].state.current.gate


# -------------------------------------------------------------------------------------------------------- the formula


def expected_gate(gate: nn.Module, x: torch.Tensor, own: torch.Tensor, kind: str) -> torch.Tensor:
    """The formula once more, token by token. Shapes: [b, n, d], [b, n] -> [b, n]"""
    opened = torch.zeros(x.shape[:2], dtype=x.dtype)
    for row in range(len(x)):
        for t in range(x.shape[1]):
            if not own[row, t]:
                continue
            seen = range(t + 1) if gate.is_causal else range(x.shape[1])
            terms = [x[row, u] / x[row, u].norm() for u in seen if own[row, u]]
            y = torch.stack(terms).sum(0) + gate.prior if kind == "sequence" else x[row, t]
            cosine = y @ gate.direction / (y.norm() * gate.direction.norm())
            opened[row, t] = ((cosine - gate.threshold) / gate.width).clamp(0, 1)
    return opened


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.BertForSequenceClassification])
def test_gate_is_that_of_the_formula(model_class: type, kind: str, padding: str) -> None:
    model = gated(model_class, kind)
    inputs = inputs_for(model)
    own = torch.ones_like(inputs["input_ids"])
    if padding != "none":
        own[0, :3] = 0
        own = own if padding == "left" else own.flip(1)
    features: list[torch.Tensor] = []
    [path] = paths_of(model)
    inputs = inputs | {"attention_mask": own}
    open_for_half(model, path, inputs, is_causal=model_class in CAUSAL and kind == "sequence")
    with path.register_forward_pre_hook(lambda path, args: features.append(args[0])):
        output_of(model, inputs)
    expected = expected_gate(path.selection.topdown_gate["default"], features[0], own != 0, kind)
    assert_same(gate_of(model).squeeze(-1), expected)
    assert 0 < (expected > 0).double().mean() < 1


@pytest.mark.parametrize(("model_class", "variant"), with_variants(FAMILIES, VARIANTS, VIT_AND_LLAMA))
def test_gate_is_a_factor_of_the_mask(model_class: type, variant: str) -> None:
    options = variant_of(model_class, variant)
    model = gated(model_class, **options)
    inputs = inputs_for(model)
    found = feedback_of(model, inputs)
    gates = [path.state.current.gate for path in paths_of(model)]
    assert any(((gate > 0) & (gate < 1)).any() or gate.any() for gate in gates)
    with ExitStack() as hooks:
        for path, gate in zip(paths_of(model), gates, strict=True):
            prompt = path.selection.topdown_prompt["default"]
            hooks.enter_context(prompt.register_forward_hook(lambda prompt, args, mask, gate=gate: mask * gate))
            path.selection.add_gate("default", None)
        expected = feedback_of(model, inputs)
    for of_path, expected_of_path in zip(found, expected, strict=True):
        for index, td in of_path.items():
            assert_same(td, expected_of_path[index])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_are_those_of_a_constant_factor(model_class: type, checkpointing: bool) -> None:
    model = gated(model_class).train()
    inputs = inputs_for(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss_of(model, inputs).backward()
    found = gradients(model)
    model.zero_grad()
    gate = gate_of(model)
    [path] = paths_of(model)
    path.selection.add_gate("default", None)
    with path.selection.topdown_prompt["default"].register_forward_hook(lambda prompt, args, mask: mask * gate):
        loss_of(model, inputs).backward()
    assert_same_gradients(found, gradients(model))


def test_gate_is_not_trained() -> None:
    model = gated(tf.LlamaForCausalLM)
    model.add_adapter("other", TopDownConfig(gate="token"))
    model.set_adapter("other")
    model.set_adapter("default")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "topdown_gate" in name)
    assert any(p.requires_grad for name, p in model.named_parameters() if "topdown_prompt.default" in name)


def test_gate_that_was_not_fitted_is_open() -> None:
    for kind in ("sequence", "token"):
        plain = steered(tiny_model(tf.LlamaForCausalLM))
        model = adapted(tiny_model(tf.LlamaForCausalLM), gate=kind)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(output_of(model), output_of(plain))


# ------------------------------------------------------------------------------------------------------------- closed


@pytest.mark.parametrize(("model_class", "variant"), with_variants(FAMILIES, VARIANTS, VIT_AND_LLAMA))
def test_closed_gate_gives_the_output_of_the_base_model(model_class: type, variant: str) -> None:
    """Bit for bit, though all of pass 2 runs."""
    base = tiny_model(model_class)
    model = steered(tiny_model(model_class), gate="sequence", **variant_of(model_class, variant))
    inputs = inputs_for(base)
    with closed(model):
        assert torch.equal(output_of(model, inputs), output_of(base, inputs))
    assert not torch.allclose(output_of(model, inputs), output_of(base, inputs), atol=1e-4)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_tokens_before_the_first_open_one_are_those_of_the_base_model(kind: str) -> None:
    model = gated(tf.LlamaForCausalLM, kind).float()
    inputs = inputs_for(model)
    [path] = paths_of(model)
    for name, parameter in path.selection.topdown_gate["default"].named_parameters():
        parameter.requires_grad_(False).mul_(
            -1 if name in ("direction", "threshold") else 1
        )  # open at the end, not at the beginning
    output = output_of(model, inputs)
    gate = gate_of(model)[..., 0] > 0
    with model.disable_adapter():
        plain = output_of(model, inputs)
    is_before = gate.cumsum(1) == 0
    assert is_before.any() and gate.any()
    assert torch.equal(output[is_before], plain[is_before])
    assert not torch.isclose(output[gate], plain[gate]).all(-1).any()


@pytest.mark.parametrize("model_class", [tf.ViTForImageClassification, tf.BertForSequenceClassification])
def test_closed_row_beside_an_open_one_is_that_of_the_base_model(model_class: type) -> None:
    model = gated(model_class).float()
    inputs = inputs_for(model)
    output = output_of(model, inputs)
    is_open = (gate_of(model) > 0).flatten(1).any(1)
    assert sorted(is_open.tolist()) == [False, True]
    with model.disable_adapter():
        plain = output_of(model, inputs)
    assert torch.equal(output[~is_open], plain[~is_open])
    assert not torch.allclose(output[is_open], plain[is_open], atol=1e-5)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_rows_can_be_skipped(model_class: type) -> None:
    base = tiny_model(model_class)
    model = steered(tiny_model(model_class), gate="sequence", skip_closed_rows=True)
    with closed(model), counted_block_calls(model) as calls:
        assert torch.equal(output_of(model, inputs_for(model)), output_of(base, inputs_for(base)))
    assert set(calls.values()) == {1}
    assert len(calls) == NUM_BLOCKS


# ------------------------------------------------------------------------------------------- rows of several texts


def test_texts_packed_into_a_row_are_those_of_rows_of_their_own() -> None:
    model = gated(tf.LlamaForCausalLM)
    ids = inputs_of(model, length=9)["input_ids"]
    packed = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(9).repeat(2)[None], "use_cache": False}
    together = output_of(model, packed)
    gate = gate_of(model).view(2, 9)
    alone = output_of(model, {"input_ids": ids, "use_cache": False})
    assert_same(gate, gate_of(model)[..., 0])
    assert_same(together.view_as(alone), alone)


def test_text_begins_where_the_position_does_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9]])
    assert first_of_texts(positions).tolist() == [
        [True, False, False, True, False, True],
        [True, False, False, False, False, False],
    ]


# ------------------------------------------------------------------------------------------------------------- caches


def pair(model_class: type, variant: str = "full", **options: Any) -> PeftModel:
    return gated(model_class, skip_closed_rows=False, **variant_of(model_class, variant), **options)


def recomputed(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return output_of(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False})


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("model_class", "variant", "skips"),
    [(*pair, True) for pair in with_variants(CAUSAL, RANGES, [tf.LlamaForCausalLM])]
    + [(model_class, "middle", False) for model_class in CAUSAL],
)
def test_cached_is_recomputed(model_class: type, variant: str, kind: str, skips: bool) -> None:
    model = gated(model_class, skip_closed_rows=skips, **variant_of(model_class, variant))
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
    parts = run_parts(model, [5, 4, 2, 1], cache, BETWEEN["nothing"])
    assert_equal_to_rounding(parts, recomputed(model, inputs_of(model, length=12)["input_ids"]))


@pytest.mark.parametrize(
    ("model_class", "decoding"),
    [
        *product(CAUSAL, ["greedy", "sampling", "beam", "static", "static beam", "chunks"]),
        *product([tf.T5ForConditionalGeneration], ["greedy", "beam", "static beam"]),
    ],
)
def test_generation_is_that_without_a_cache(model_class: type, decoding: str) -> None:
    model = gated(model_class)
    options = DECODING[decoding]
    without = {
        name: value for name, value in options.items() if name not in ("cache_implementation", "prefill_chunk_size")
    }
    assert_same_numbers(generate(model, **options), generate(model, **without, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_left_padding_counts_for_nothing(options: dict[str, Any]) -> None:
    model = gated(tf.LlamaForCausalLM)
    ids = inputs_of(model, length=6)["input_ids"]
    ids[0, :3] = 0
    padded = generate(model, input_ids=ids, attention_mask=(ids != 0).long(), **options)
    alone = generate(model, input_ids=ids[:1, 3:], attention_mask=torch.ones(1, 3), **options)
    assert torch.equal(padded.sequences[0, 3:], alone.sequences[0])
    for of_step, of_step_alone in zip(padded.logits, alone.logits, strict=True):
        assert_equal_to_rounding(of_step[: len(of_step_alone)], of_step_alone)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, "assistant"])
def test_assisted_decoding_crops_the_sum(how: Any) -> None:
    model = gated(tf.LlamaForCausalLM)
    ids = inputs_of(model, batch_size=1, length=6)["input_ids"].repeat(1, 3)
    options = {"assistant_model": tiny_model(tf.LlamaForCausalLM).double()} if how == "assistant" else how
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_same_numbers(generate(model, **given, **options), generate(model, **given, use_cache=False))


@pytest.mark.parametrize(("kind", "between"), [row[1:] for row in CONTINUED if row[0] is tf.LlamaForCausalLM])
def test_sum_follows_what_is_done_to_the_cache(kind: str, between: str) -> None:
    """The cached logits of the last part are those of the rows and tokens that the cache was left with."""
    model = gated(tf.LlamaForCausalLM)
    cache: Cache | None = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
    first, second = inputs_of(model, length=9)["input_ids"].split([6, 3], dim=1)
    with torch.no_grad():
        cache = model(input_ids=first, **{CACHE: cache}, use_cache=True)[CACHE]
        BETWEEN[between](cache)
        found = model(input_ids=second, **{CACHE: cache}, use_cache=True).logits
    left = {"reorder": first.flip(0), "select": first[[0, 1]], "crop": first[:, :-1]}.get(between, first)
    expected = recomputed(model, torch.cat([left, second], dim=1))[:, -3:]
    assert_equal_to_rounding(found, expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sum_begins_anew_in_a_cache_that_was_reset(kind: str) -> None:
    model = gated(tf.LlamaForCausalLM)
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache()
    results = []
    for _ in range(2):
        results.append(output_of(model, inputs_of(model) | {CACHE: cache}))
        cache.reset()
    assert torch.equal(*results)


def test_cache_of_an_adapter_without_a_gate_is_refused_with_one() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    cache = DynamicCache()
    output_of(model, inputs_of(model) | {CACHE: cache})
    [path] = paths_of(model)
    path.selection.topdown_config["default"].gate = "sequence"
    path.selection.add_gate("default", "sequence", is_causal=True)
    with pytest.raises(ValueError, match="filled before the TOAST adapter 'default' got its gate"):
        output_of(model, inputs_of(model) | {CACHE: cache})


def test_static_cache_of_sliding_windows_is_refused() -> None:
    model = steered(tiny_model(tf.MistralForCausalLM), gate="sequence")
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert all(layer.is_sliding for layer in cache.layers)
    with pytest.raises(NotImplementedError, match="how long a static cache may get"):
        output_of(model, inputs_of(model) | {CACHE: cache})


# ---------------------------------------------------------------------------------------------- beside other features


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_is_under_the_gate(model_class: type, variant: str) -> None:
    model = gated(model_class, **variant_of(model_class, variant))
    before = output_of(model, inputs_for(model))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fuse_feedback()
    assert_same(output_of(model, inputs_for(model)), before)


@pytest.mark.parametrize("variant", ["full", "late"])
def test_stored_features_are_under_the_gate(variant: str, tmp_path: Any) -> None:
    model = gated(tf.LlamaForCausalLM, **variant_of(tf.LlamaForCausalLM, variant))
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in inputs_of(model)["input_ids"]]
    stored = store_features(model, rows, tmp_path, dtype=torch.float64)
    batch = stored.collate([stored[0], stored[1]])
    assert "topdown_features" in batch
    plain = {name: value for name, value in batch.items() if name != "topdown_features"} | {"use_cache": False}
    assert_same(output_of(model, plain | {"topdown_features": batch["topdown_features"]}), output_of(model, plain))


def test_compiled_model_has_its_gate() -> None:
    model = gated(tf.ViTForImageClassification, size={"num_hidden_layers": 2})
    inputs = inputs_for(model)
    with model.disable_adapter():  # before it is compiled, as PEFT's layers have another attribute since then
        plain = output_of(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(output_of(compiled, inputs), output_of(model, inputs))
    with closed(model), torch.compiler.set_stance("fail_on_recompile"):
        assert_same(output_of(compiled, inputs), plain)


@pytest.mark.slow
@pytest.mark.usefixtures("compiles_static_caches")
def test_compiled_decoding_with_a_static_cache() -> None:
    model = gated(tf.LlamaForCausalLM, size={"num_hidden_layers": 2})
    with torch.compiler.set_stance("force_eager"):
        expected = generate(model, use_cache=False)
    assert_same_numbers(generate(model, **COMPILED), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_copies_and_saved_adapters_have_it(tmp_path: Any) -> None:
    model = gated(tf.LlamaForCausalLM).float()
    config = model.peft_config["default"]
    config.gate_is_causal, config.gate_report = {"model.layers": True}, {"auc": 0.9}
    expected = output_of(model, inputs_for(model))
    assert torch.equal(output_of(copy.deepcopy(model), inputs_for(model)), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs_for(model)), expected)
    assert loaded.peft_config["default"].gate_report == {"auc": 0.9}


def test_saving_a_gate_that_was_not_fitted_warns(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="never fitted and is open for all inputs"):
        adapted(tiny_model(tf.LlamaForCausalLM), gate="sequence").save_pretrained(tmp_path)


def test_start_from_another_adapter_has_a_gate_of_its_own(tmp_path: Any) -> None:
    saved = gated(tf.LlamaForCausalLM).float()
    saved.peft_config["default"].gate_report = {"auc": 0.9}
    saved.save_pretrained(tmp_path)
    for gate in (None, "token"):
        model = adapted(tiny_model(tf.LlamaForCausalLM), pretrained_feedback=str(tmp_path), gate=gate)
        gates = paths_of(model)[0].selection.topdown_gate
        assert list(gates) == ([] if gate is None else ["default"])
        assert all(not gate.direction.any() for gate in gates.values())


def test_not_together_with_a_bias_that_counts_twice() -> None:
    with pytest.raises(ValueError, match="`gate='token'` cannot be used with `double_value_bias=True`"):
        TopDownConfig(gate="token", double_value_bias=True)


@pytest.mark.parametrize("value", ["rows", True, 1])
def test_other_kinds_of_gates_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`gate` is .*expected 'sequence', 'token' or None"):
        TopDownConfig(gate=value)


@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, tf.ConvNextForImageClassification])
def test_explanation_and_statistics_have_it(model_class: type) -> None:
    model = gated(model_class)
    inputs = inputs_for(model)
    explanation = explain(model, inputs)
    output_of(model, inputs)
    assert_same(torch.from_numpy(explanation.gate), gate_of(model).squeeze(-1).float())
    assert feedback_statistics(model)["mean_gate"] == pytest.approx(gate_of(model).mean().item())
    assert explanation.plot() is not None
    assert explain(steered(tiny_model(model_class)), inputs_of(model)).gate is None


def test_tokens_without_a_batch_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="all rows in one sequence"):
        Gate(4, is_running=True)(torch.ones(3, 4), Tokens())

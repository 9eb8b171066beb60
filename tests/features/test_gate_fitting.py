"""`fit_gate`: the closed form, what it reports, and what it refuses. What a gate does is in `test_gate.py`."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch.nn import functional as F

import toast_peft
from toast_peft import TopDownConfig, fit_gate, initialize_feedback

from ..helpers import adapted, assert_same, assert_state_is, output_of, paths_of, state_of, steered
from ..zoo import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
Batches = list[dict[str, torch.Tensor]]


def texts(low: int, high: int, seed: int, rows: int = 8, length: int = 12) -> Batches:
    """Two batches of random tokens from a part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(low, high, (rows, length), generator=generator)} for _ in range(2)]


def pictures(mean: float, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": mean + 0.5 * torch.randn(6, 3, 8, 8, generator=generator)} for _ in range(2)]


TARGET, REFERENCE, OTHER = texts(2, 12, 0), texts(12, 30, 1), texts(30, VOCAB_SIZE, 2)


def llama(**options: Any) -> PeftModel:
    return steered(tiny_model(tf.LlamaForCausalLM), **options)


def gate_of(model: PeftModel) -> Any:
    [path] = paths_of(model)
    return path.selection.topdown_gate["default"]


def features_of(model: PeftModel, batches: Batches) -> np.ndarray:
    """The normalised features of pass 1, in double precision. Shape: [b, n, d]"""
    found: list[torch.Tensor] = []
    [path] = paths_of(model)
    with path.register_forward_pre_hook(lambda path, args: found.append(args[0])):
        for batch in batches:
            output_of(model, batch | {"use_cache": False})
    return F.normalize(torch.cat(found).double(), dim=-1).numpy()


def y_of(x: np.ndarray, kind: str, prior: np.ndarray) -> np.ndarray:
    """What is compared with the direction. Shapes: [b, n, d], [d] -> [b, n, d]"""
    y = x.cumsum(1) + prior if kind == "sequence" else x
    return y / np.linalg.norm(y, axis=-1, keepdims=True)


def closed_for(scores: np.ndarray, kind: str, quantile: float) -> float:
    """The threshold for a domain: of whole rows, or of tokens. Shape: [b, n]"""
    return float(np.quantile(scores.max(1) if kind == "sequence" else scores, quantile, method="higher"))


# --------------------------------------------------------------------------------------------------- the closed form


@pytest.mark.parametrize("quantile", [None, 0.8])
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_one_domain_is_told_by_the_difference_of_the_means(kind: str, quantile: float | None) -> None:
    model = llama()
    report = fit_gate(model, TARGET, REFERENCE, gate=kind, quantile=quantile)
    gate, x = gate_of(model), features_of(model, REFERENCE)
    prior = 16 * x.mean((0, 1))
    target, reference = y_of(features_of(model, TARGET), kind, prior), y_of(x, kind, prior)
    direction = target.mean((0, 1)) - reference.mean((0, 1))
    direction /= np.linalg.norm(direction)
    opened, closed = target @ direction, reference @ direction
    threshold = closed_for(closed, kind, quantile or {"sequence": 0.95, "token": 0.99}[kind])
    np.testing.assert_allclose(gate.direction.numpy(), direction, atol=1e-5)
    np.testing.assert_allclose(gate.threshold.numpy(), [threshold], atol=1e-5)
    np.testing.assert_allclose(gate.width.numpy(), [max(np.median(opened) - threshold, 0.3 * closed.std())], atol=1e-2)
    assert report["auc"] == pytest.approx((opened.reshape(-1, 1) > closed.flatten()).mean(), abs=1e-3)
    assert report["open_target"] == pytest.approx((opened > threshold).mean(), abs=0.02)
    assert report["open_reference"] == pytest.approx((closed > threshold + 1e-6).mean(), abs=0.01)
    if kind == "sequence":
        np.testing.assert_allclose(gate.prior.numpy(), prior, atol=1e-4)
    else:
        assert gate.prior is None


def test_several_domains_are_told_as_their_covariance_says() -> None:
    model = llama()
    report = fit_gate(model, TARGET, {"stories": REFERENCE, "news": OTHER})
    of_target, of_stories, of_news = (features_of(model, batches) for batches in (TARGET, REFERENCE, OTHER))
    prior = 8 * (of_stories.mean((0, 1)) + of_news.mean((0, 1)))
    target, stories, news = (y_of(x, "sequence", prior) for x in (of_target, of_stories, of_news))
    reference = np.concatenate([stories, news])
    covariance = sum(np.cov(y.reshape(-1, y.shape[-1]).T, bias=True) for y in (target, reference)) / 2
    covariance += np.diag(covariance).mean() * np.eye(len(covariance))
    direction = np.linalg.solve(covariance, target.mean((0, 1)) - reference.mean((0, 1)))
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(gate_of(model).prior.numpy(), prior, atol=1e-4)
    np.testing.assert_allclose(gate_of(model).direction.numpy(), direction, atol=1e-4)
    threshold = max(closed_for(y @ direction, "sequence", 0.95) for y in (stories, news))
    np.testing.assert_allclose(gate_of(model).threshold.numpy(), [threshold], atol=1e-4)
    assert set(report) == {"auc", "open_target", "open_stories", "open_news"}
    assert max(report["open_stories"], report["open_news"]) <= 0.05


def test_quantile_is_the_share_of_rows_that_are_left_alone() -> None:
    """From the first token to the last: all of their logits are those of the base model."""
    model = llama()
    fit_gate(model, TARGET, REFERENCE, quantile=0.75)
    output_is_that_of_base = []
    for batch in REFERENCE:
        inputs = batch | {"use_cache": False}
        output = output_of(model, inputs)
        with model.disable_adapter():
            output_is_that_of_base.append((output == output_of(model, inputs)).flatten(1).all(1))
    assert torch.cat(output_is_that_of_base).sum() == 13  # the 0.75 quantile of 16 numbers is the thirteenth


def test_whole_rows_of_a_model_whose_tokens_see_all_others() -> None:
    model = steered(tiny_model(tf.BertForSequenceClassification))
    fit_gate(model, TARGET, REFERENCE)
    gate, target, reference = gate_of(model), features_of(model, TARGET), features_of(model, REFERENCE)
    prior = 16 * reference.mean((0, 1))
    rows = [x.sum(1) + prior for x in (target, reference)]
    of_target, of_reference = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in rows)
    direction = of_target.mean(0) - of_reference.mean(0)
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(gate.prior.numpy(), prior, atol=1e-4)
    np.testing.assert_allclose(gate.direction.numpy(), direction, atol=1e-4)
    threshold = np.quantile(of_reference @ direction, 0.95, method="higher")
    np.testing.assert_allclose(gate.threshold.numpy(), [threshold], atol=1e-5)


def padded(batches: Batches, side: str) -> Batches:
    """The same with three tokens of padding on a side, and a row of nothing else."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        zeros = torch.zeros(len(ids), 3, dtype=torch.long)
        pair = (zeros, ids) if side == "left" else (ids, zeros)
        mask = torch.cat([torch.full_like(part, int(part is ids)) for part in pair], dim=1)
        rows = {"input_ids": torch.cat(pair, dim=1), "attention_mask": mask}
        found.append({name: F.pad(x, (0, 0, 0, 1)) for name, x in rows.items()})
    return found


def assert_same_gate(gate: Any, expected: Any) -> None:
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(getattr(gate, name), parameter, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    model = llama()
    fit_gate(model, TARGET, REFERENCE)
    expected = gate_of(model)
    fit_gate(model, padded(TARGET, side), padded(REFERENCE, side))
    assert_same_gate(gate_of(model), expected)


def test_mask_of_one_row_is_that_of_all() -> None:
    model = llama()
    fit_gate(model, TARGET, REFERENCE)
    expected = gate_of(model)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    fit_gate(model, *([batch | {"attention_mask": mask} for batch in side] for side in (TARGET, REFERENCE)))
    assert_same_gate(gate_of(model), expected)


def test_packed_texts_are_rows() -> None:
    model = llama()
    halves = [[{"input_ids": x["input_ids"].view(-1, 6)} for x in side] for side in (TARGET, REFERENCE)]
    fit_gate(model, *halves, quantile=0.8)
    expected = gate_of(model)
    positions = torch.arange(12).remainder(6)[None]
    packed = [[x | {"position_ids": positions, "use_cache": False} for x in side] for side in (TARGET, REFERENCE)]
    fit_gate(model, *packed, quantile=0.8)
    assert_same_gate(gate_of(model), expected)


@pytest.mark.parametrize("seed", range(4))
def test_low_precision_leaves_the_reference_closed(seed: int) -> None:
    base = tiny_model(tf.LlamaForCausalLM).to(torch.bfloat16)
    model = get_peft_model(base, TopDownConfig(gate="sequence"), autocast_adapter_dtype=False).eval()
    assert gate_of(model).direction.dtype == torch.bfloat16
    reference = texts(12, 30, seed, rows=16, length=24)
    fit_gate(model, texts(2, 12, seed, rows=16, length=24), reference, quantile=1.0)
    for batch in reference:
        output_of(model, batch)
        assert not paths_of(model)[0].state.current.gate.any()


def test_it_does_not_depend_on_the_adapter() -> None:
    """So it can be fitted before training or after, also where the gate was open or closed before."""
    model = llama(gate="sequence")
    first = fit_gate(model, TARGET, REFERENCE)
    before = {name: value.clone() for name, value in gate_of(model).state_dict().items()}
    for name, parameter in model.named_parameters():
        if "topdown_" in name and "gate" not in name:
            parameter.data.add_(0.1)
    assert fit_gate(model, TARGET, REFERENCE) == first
    assert all(torch.equal(value, before[name]) for name, value in gate_of(model).state_dict().items())


def test_data_that_can_be_read_once() -> None:
    model = llama()
    expected = fit_gate(model, TARGET, REFERENCE)
    assert fit_gate(model, iter(TARGET), iter(REFERENCE)) == expected


class Stream(torch.utils.data.IterableDataset):
    """Rows that can be read once, also where a `DataLoader` is asked for them anew."""

    def __init__(self, batches: Batches) -> None:
        self.rows = iter([{"input_ids": ids} for batch in batches for ids in batch["input_ids"]])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.rows


@pytest.mark.parametrize("num_batches", [1, 2])
def test_stream_that_can_be_read_once(num_batches: int) -> None:
    model = llama()
    target = TARGET[:num_batches]
    expected = fit_gate(model, target, REFERENCE)
    assert fit_gate(model, torch.utils.data.DataLoader(Stream(target), batch_size=8), REFERENCE) == expected


def test_fitted_in_inference_mode_it_can_be_changed_outside() -> None:
    model, other = llama(), llama()
    with torch.inference_mode():
        report = fit_gate(model, TARGET, REFERENCE)
    assert fit_gate(other, TARGET, REFERENCE) == report
    model.load_state_dict(model.state_dict())
    model.set_adapter("default")
    model.add_adapter("other", TopDownConfig(r=2))
    for name, parameter in gate_of(other).named_parameters():
        assert not gate_of(model).get_parameter(name).is_inference()
        assert_same(gate_of(model).get_parameter(name), parameter, name)


# ----------------------------------------------------------------------------------------------- what it is used for


def test_reference_gets_the_output_of_the_base_model() -> None:
    model = llama()
    fit_gate(model, TARGET, REFERENCE, quantile=1.0)
    for batch in REFERENCE:
        output_of(model, batch)
        assert not paths_of(model)[0].state.current.gate.any()
    inputs = REFERENCE[0] | {"use_cache": False}
    adapted_output = output_of(model, inputs)
    with model.disable_adapter():
        assert torch.equal(adapted_output, output_of(model, inputs))
        plain = output_of(model, TARGET[0] | {"use_cache": False})
    assert not torch.allclose(output_of(model, TARGET[0] | {"use_cache": False}), plain, atol=1e-4)


def test_rows_of_images() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    report = fit_gate(model, pictures(1.0, 0), pictures(-1.0, 1))
    assert report == {"auc": 1.0, "open_target": 1.0, "open_reference": 0.0}
    output = output_of(model, pictures(-1.0, 1)[0])
    with model.disable_adapter():
        assert torch.equal(output, output_of(model, pictures(-1.0, 1)[0]))


def test_base_model_writes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toast_peft.gate_fitting._GENERATED", (8, 16))
    model = llama()
    model.generation_config.update(temperature=0.1, top_k=1, bos_token_id=1)  # not how it writes here
    rng = torch.get_rng_state()
    first = fit_gate(model, TARGET, "generate")
    assert torch.equal(torch.get_rng_state(), rng)
    assert first["open_reference"] == 0
    assert fit_gate(model, TARGET, "generate") == first
    assert model.active_adapters == ["default"]


def test_initialize_feedback_fits_it_as_well() -> None:
    model, other = llama(gate="sequence"), llama(gate="sequence")
    report = fit_gate(model, TARGET, REFERENCE)
    initialize_feedback(other, TARGET, reference=REFERENCE)
    assert other.peft_config["default"].gate_report == report
    with pytest.raises(ValueError, match="read twice; expected a list"):
        initialize_feedback(other, iter(TARGET), reference=REFERENCE)


def test_saved_with_the_adapter(tmp_path: Any) -> None:
    model = llama()
    report = fit_gate(model, TARGET, REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), tmp_path).eval()
    config = loaded.peft_config["default"]
    assert (config.gate, config.gate_is_causal, config.gate_report) == ("sequence", {"model.layers": True}, report)
    for batch in (TARGET[0], REFERENCE[0]):
        assert torch.equal(output_of(loaded, batch), output_of(model, batch))


def test_injected_adapters_and_encoder_decoders_have_gates() -> None:
    model = inject_adapter_in_model(TopDownConfig(), tiny_model(tf.T5ForConditionalGeneration))
    sides = [
        [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches] for batches in (TARGET, REFERENCE)
    ]
    report = fit_gate(model, *sides)
    assert set(report) == {
        f"{stack}.block.{name}"
        for stack in ("encoder", "decoder")
        for name in ("auc", "open_target", "open_reference")
    }
    [encoder, decoder] = [path.selection.topdown_gate["default"] for path in paths_of(model)]
    assert (encoder.is_causal, decoder.is_causal) == (False, True)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings("default:The gate of the TOAST adapter")
def test_a_gate_that_cannot_tell_warns() -> None:
    model = llama()
    with pytest.warns(UserWarning, match="does not tell the target well from the reference"):
        report = fit_gate(model, TARGET, texts(2, 12, 5))
    assert report["auc"] < 0.9


@pytest.mark.filterwarnings("default:The gate of the TOAST adapter")
@pytest.mark.parametrize("few", [0, 1, 2])
def test_few_rows_of_any_side_are_warned_of(few: int) -> None:
    sides = [texts(low, low + 10, seed=low, rows=2 if side == few else 10) for side, low in enumerate((2, 14, 26))]
    target, reference, other = sides
    with pytest.warns(UserWarning, match="fitted to as few as 4 rows of a domain"):
        fit_gate(llama(), target, {"stories": reference, "news": other})


REFUSED = {
    "the same on both sides": (TARGET, TARGET, {}, "have the same features"),
    "no batches": ([], REFERENCE, {}, "target has no batches"),
    "no tokens": (TARGET, [], {}, "reference gave no tokens"),
    "no dicts": (TARGET, [torch.ones(2, 3)], {}, "expected dicts of model inputs"),
    "one batch": (TARGET, REFERENCE[0], {}, r"`reference` is one batch, .* expected a list of batches: \[batch\]"),
    "one batch as target": (TARGET[0], REFERENCE, {}, r"gave a str; .* One batch goes into a list: \[batch\]"),
    "no number": (TARGET, REFERENCE, {"quantile": "0.9"}, "`quantile` is '0.9'; expected a share"),
    "no domains": (TARGET, {}, {}, "`reference` has no domains"),
    "no such word": (TARGET, "web", {}, "`reference` is 'web'; expected batches"),
    "no such adapter": (TARGET, REFERENCE, {"adapter_name": "law"}, "expected the active TOAST adapter"),
    "no share": (TARGET, REFERENCE, {"quantile": 1.5}, "`quantile` is 1.5; expected a share"),
    "no such gate": (TARGET, REFERENCE, {"gate": "rows"}, "`gate` is 'rows'; expected 'sequence' or 'token'"),
}


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_leaves_the_model_as_it_was(case: str, has_gate: bool) -> None:
    target, reference, options, message = REFUSED[case]
    model = llama()
    if has_gate:
        fit_gate(model, OTHER, REFERENCE, gate="token")
    before = state_of(model)
    config = model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=message):
        fit_gate(model, target, reference, **options)
    assert_state_is(model, before)
    assert model.peft_config["default"].to_dict() == config


def test_hidden_states_that_are_no_numbers_are_refused() -> None:
    model = llama()
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_gate(model, TARGET, REFERENCE)
    assert len(paths_of(model)[0].selection.topdown_gate) == 0


def test_only_models_that_write_can_write_the_reference() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    with pytest.raises(ValueError, match="expected a `PeftModel` that generates text"):
        fit_gate(model, pictures(1.0, 0), "generate")
    model = llama()
    model.generation_config.update(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="needs a token to begin with"):
        fit_gate(model, TARGET, "generate")


def test_bias_that_counts_twice_is_refused() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification), double_value_bias=True)
    with pytest.raises(ValueError, match="`double_value_bias=True`"):
        fit_gate(model, pictures(1.0, 0), pictures(-1.0, 1))


def test_it_is_public() -> None:
    assert toast_peft.fit_gate is fit_gate
    assert "fit_gate" in toast_peft.__all__
    assert adapted(tiny_model(tf.LlamaForCausalLM)).peft_config["default"].gate is None

"""Stored pass 1: the same numbers without running it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from toast_peft import StoredFeatures, initialize_feedback, store_features

from ..helpers import (
    CACHE,
    adapted,
    blocks_of,
    counted_block_calls,
    gradients,
    loss_of,
    output_of,
    paths_of,
    state_of,
    steered,
)
from ..zoo import VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model

ROWS = 6
LENGTHS = [4, 9, 2, 7, 5, 3]
Rows = list[dict[str, torch.Tensor]]


def rows_of(model: nn.Module, count: int = ROWS) -> Rows:
    """Rows of a data set, in the dtype of the model."""
    inputs = inputs_of(model, count)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return [{name: x[i] for name, x in inputs.items()} for i in range(count)]


def exact_model(model_class: type, **options: Any) -> PeftModel:
    return steered(tiny_model(model_class), **options).double().train()


def all_of(stored: StoredFeatures) -> dict[str, torch.Tensor]:
    """A batch of all rows."""
    return stored.collate([stored[index] for index in range(len(stored))])


def without(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if name != "topdown_features"}


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**batch).loss if "labels" in batch else loss_of(model, batch)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def assert_exact(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)
    assert max(tensor.abs().max() for tensor in expected.values()) > 1e-3


# --------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_loss_and_gradients_are_those_of_two_passes(model_class: type, variant: str, tmp_path: Path) -> None:
    model = exact_model(model_class, **VARIANTS[variant])
    batch = all_of(store_features(model, rows_of(model), tmp_path, batch_size=4))
    expected = loss_and_gradients(model, without(batch))
    with counted_block_calls(model) as calls:
        found = loss_and_gradients(model, batch)
    assert_exact(found, expected)
    feedback_to = VARIANTS[variant].get("feedback_to", 0)
    assert dict(calls) == dict.fromkeys(range(feedback_to, 4), 1)
    assert batch["topdown_features"].shape[2] == (2 if feedback_to else 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradient_checkpointing(model_class: type, checkpointing: bool, tmp_path: Path) -> None:
    model = exact_model(model_class, feedback_to=2)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    expected = loss_and_gradients(model, without(batch))
    model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_exact(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize("model_class", [tf.BertForSequenceClassification, tf.ViTForImageClassification])
def test_with_dropout_the_lower_blocks_run_as_they_would(model_class: type, tmp_path: Path) -> None:
    model = steered(tiny_model(model_class, hidden_dropout_prob=0.5), feedback_to=2).double().train()
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_variational_loss(model_class: type, tmp_path: Path) -> None:
    model = exact_model(model_class, variational_weight=0.5, feedback_to=1)
    rows = [row | {"labels": row.get("input_ids", torch.tensor(1))} for row in rows_of(model)]
    batch = all_of(store_features(model, rows, tmp_path))
    assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)))


@pytest.mark.parametrize("model_class", [tf.ViTModel, tf.LlamaModel, tf.DebertaV2ForSequenceClassification])
def test_a_bare_backbone_and_blocks_that_return_more_than_hidden_states(model_class: type, tmp_path: Path) -> None:
    model = exact_model(model_class, feedback_to=2)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_hidden_states_that_are_asked_for_are_all_there(model_class: type, tmp_path: Path) -> None:
    model = exact_model(model_class, feedback_to=2)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    found, expected = (model(**b, output_hidden_states=True).hidden_states for b in (batch, without(batch)))
    assert len(found) == 5
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_half_precision_files_of_a_model_in_float32(model_class: type, tmp_path: Path) -> None:
    model = steered(tiny_model(model_class), feedback_to=2).train()
    batch = all_of(store_features(model, rows_of(model), tmp_path, dtype=torch.float16))
    assert batch["topdown_features"].dtype == torch.float32
    found, expected = loss_and_gradients(model, batch), loss_and_gradients(model, without(batch))
    assert found["loss"] != expected["loss"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-3, atol=1e-3)


def test_no_cache_is_made(tmp_path: Path) -> None:
    """That of pass 2 alone could be continued, with other keys and values."""
    model = exact_model(tf.LlamaForCausalLM)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    assert model(**without(batch)).get(CACHE) is not None
    assert model(**batch).get(CACHE) is None


def test_a_batch_without_features_runs_twice(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    expected = output_of(model, inputs := without(all_of(store_features(model, rows_of(model), tmp_path))))
    with counted_block_calls(model) as calls:
        assert torch.equal(output_of(model, inputs), expected)
    assert dict(calls) == dict.fromkeys(range(4), 2)


def test_disabled_adapter_ignores_them(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    with model.disable_adapter():
        assert torch.equal(output_of(model, batch), output_of(model, without(batch)))
    assert paths_of(model)[0].state.current.stored is None


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback(model_class: type, tmp_path: Path) -> None:
    model = exact_model(model_class, feedback_to=2).eval()
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    expected = output_of(model, without(batch))
    model.fuse_feedback()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=0, atol=1e-10)


def test_initialisation_from_data_runs_pass_1(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTForImageClassification))
    copied = copy.deepcopy(model)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    initialize_feedback(model, [batch])
    initialize_feedback(copied, [without(batch)])
    assert all(map(torch.equal, model.state_dict().values(), copied.state_dict().values()))


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    model = steered(tiny_model(tf.ViTForImageClassification), feedback_to=2).train()
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    expected = loss_and_gradients(model, batch)
    torch.compiler.reset()
    found = loss_and_gradients(torch.compile(model, backend="eager"), batch)
    assert torch.allclose(found["loss"], expected["loss"], atol=1e-5)
    assert paths_of(model)[0].state.current.stored is None


# ------------------------------------------------------------------------------------------------------------ padding


def sentences(count: int = ROWS) -> Rows:
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 40, (length,), generator=generator)} for length in LENGTHS[:count]]


def pad_on(side: str, first_label: bool = False) -> Callable[[Rows], dict[str, torch.Tensor]]:
    """A collator that pads to the longest row of a batch; on the left the first token has no label unless asked."""

    def collate(rows: Rows) -> dict[str, torch.Tensor]:
        pad = {
            name: nn.utils.rnn.pad_sequence(
                [fill(row["input_ids"]) for row in rows], batch_first=True, padding_value=value, padding_side=side
            )
            for name, fill, value in (
                ("input_ids", torch.clone, 0),
                ("attention_mask", torch.ones_like, 0),
                ("labels", torch.clone, -100),
            )
        }
        if side == "left" and not first_label:
            pad["labels"][pad["attention_mask"].cumsum(1) == 1] = -100
        return pad

    return collate


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("model_class", "variant"), [(tf.LlamaForCausalLM, "late"), (tf.OPTForCausalLM, "full")])
def test_rows_are_padded_as_the_batch_is(model_class: type, side: str, variant: str, tmp_path: Path) -> None:
    model = exact_model(model_class, **VARIANTS[variant])
    stored = store_features(model, sentences(), tmp_path, batch_size=2, data_collator=pad_on(side))
    assert [len(stored.shards[index].features) for index in range(ROWS)] == LENGTHS
    for indices in ([1, 0, 4], [2, 5], [3, 2, 1, 0]):
        batch = stored.collate([stored[index] for index in indices])
        # A LLaMA turns by positions in float32, which padding on the left moves.
        atol = 1e-6 if side == "left" and model_class is tf.LlamaForCausalLM else 1e-10
        assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)), atol)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("model_class", "variant"), [(tf.ViTForImageClassification, "full"), (tf.LlamaForCausalLM, "late")]
)
def test_a_trainer_takes_the_same_steps(model_class: type, variant: str, tmp_path: Path) -> None:
    """With the defaults: it drops inputs that are not in the signature, and it evaluates on plain rows."""

    def logged(is_stored: bool) -> list[dict[str, float]]:
        model = steered(tiny_model(model_class), **VARIANTS[variant]).double()
        rows = [row | {"labels": row.get("input_ids", torch.tensor(i % 2))} for i, row in enumerate(rows_of(model))]
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
        options |= {"eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "use_cpu": True}
        options |= {"disable_tqdm": True, "label_names": ["labels"], "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path / "out"), **options)
        stored = store_features(model, rows, tmp_path / "features") if is_stored else None
        data = {"train_dataset": rows if stored is None else stored, "eval_dataset": rows}
        trainer = Trainer(model=model, args=arguments, data_collator=stored and stored.collate, **data)
        with counted_block_calls(model) as calls:
            trainer.train()
        passes = {"full": (4 + 2 * 2, 4 * 2 + 2 * 2), "late": (2, 4 + 2)}[variant]  # four steps and two evaluations
        assert calls[0] == passes[0 if is_stored else 1]
        kept = ("loss", "grad_norm", "eval_loss")
        return [{name: x for name, x in entry.items() if name in kept} for entry in trainer.state.log_history]

    for found, expected in zip(logged(True), logged(False), strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_dataloader_with_processes(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    stored = store_features(model, rows_of(model), tmp_path)
    options = {"batch_size": ROWS, "collate_fn": stored.collate, "num_workers": 1}
    [batch] = torch.utils.data.DataLoader(stored, **options)
    assert torch.equal(batch["topdown_features"], all_of(stored)["topdown_features"])


# ---------------------------------------------------------------------------------------------------- leaving nothing


@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, tf.ViTModel])
def test_unload_takes_the_input_away(model_class: type, tmp_path: Path) -> None:
    base = tiny_model(model_class)
    before = state_of(base)
    model = adapted(base)
    store_features(model, rows_of(model), tmp_path)
    store_features(model, rows_of(model), tmp_path)
    unloaded = model.unload()
    for name in ("peft_config", "_hf_peft_config_loaded", "active_adapter"):
        vars(unloaded).pop(name, None)
    assert "forward" not in vars(unloaded)
    assert state_of(unloaded)["weights"].keys() == before["weights"].keys()


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    model = exact_model(tf.LlamaForCausalLM, feedback_to=2)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    expected = output_of(model, without(batch))

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    with blocks_of(model)[3].register_forward_hook(fail), pytest.raises(RuntimeError, match="on purpose"):
        model(**batch)
    current = paths_of(model)[0].state.current
    assert current.stored is None and current.run is None
    assert torch.equal(output_of(model, without(batch)), expected)


def test_a_copy_takes_them_by_itself(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    copied = copy.deepcopy(model)
    expected = output_of(model, batch)
    model.unload()
    assert torch.equal(output_of(copied, batch), expected)

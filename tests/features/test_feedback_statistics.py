"""How much gets through the mask: `feedback_statistics`, and the callback that logs it."""

import copy
import json
import pickle
import sqlite3
import threading
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, inject_adapter_in_model
from torch.nn import functional as F

import toast_peft.callback
from toast_peft import FeedbackCallback, TopDownConfig, feedback_statistics, prompt_from

from ..helpers import CACHE, adapted, features_of, loss_of, output_of, paths_of, steered
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model
from .test_trainer import new_model, trainer_for

Statistics = dict[str, float]


def expected_statistics(model: PeftModel, inputs: dict[str, torch.Tensor]) -> Statistics:
    with torch.no_grad(), model.disable_adapter():
        features = features_of(model, inputs, 4)
    prompt = paths_of(model)[0].selection.topdown_prompt[model.active_adapter].weight
    mask = F.cosine_similarity(features, prompt.expand_as(features), dim=-1).clamp(0, 1)
    return pytest.approx({"open_tokens": (mask > 0).float().mean().item(), "mean_mask": mask.mean().item()}, rel=1e-4)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_of_the_last_forward_with_an_active_adapter(model_class: type) -> None:
    model = adapted(tiny_model(model_class))
    assert model.feedback_statistics() == {}
    inputs = inputs_of(model)
    with torch.no_grad():  # open for some tokens
        features = features_of(model, inputs, 4)
        paths_of(model)[0].selection.topdown_prompt["default"].weight.copy_(features[0, -1] - features[1, -1])
    expected = expected_statistics(model, inputs)
    assert 0 < expected.expected["open_tokens"] < 1
    output_of(model, inputs)
    with model.disable_adapter():
        output_of(model, {name: x[:1] for name, x in inputs.items()})
    assert model.feedback_statistics() == expected == feedback_statistics(model.get_base_model())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    ids = inputs_of(model)["input_ids"]
    output_of(model, {"input_ids": ids})
    expected = pytest.approx(model.feedback_statistics(), rel=1e-4)
    padding = (5, 0) if side == "left" else (0, 5)
    mask = F.pad(torch.ones_like(ids), padding)
    output_of(model, {"input_ids": F.pad(ids, padding, value=7), "attention_mask": mask})
    assert model.feedback_statistics() == expected
    output_of(model, {"input_ids": F.pad(ids, padding, value=7)})
    assert model.feedback_statistics() != expected


@pytest.mark.parametrize("gate", [None, "sequence"])
def test_batch_of_padding_has_none(gate: str | None) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), gate=gate)
    ids = inputs_of(model)["input_ids"]
    output_of(model, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)})
    assert model.feedback_statistics() == {}


def test_prompt_from_an_example_leaves_them() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), gate="token")
    inputs = inputs_of(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 2:] = 0
    output_of(model, inputs | {"attention_mask": mask})
    expected = model.feedback_statistics()
    prompt_from(model, inputs)
    assert model.feedback_statistics() == expected != {}


def test_cached_tokens_are_not_counted() -> None:
    """The attention mask of a decoding step is about all tokens so far, the step about the last one."""
    model = steered(tiny_model(tf.LlamaForCausalLM))
    ids, cache = inputs_of(model)["input_ids"], tf.DynamicCache()
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -1] = 0
    output_of(model, {"input_ids": ids[:, :-1], CACHE: cache})
    output_of(model, {"input_ids": ids[:, -1:], "attention_mask": attention_mask, CACHE: cache})
    first, second = paths_of(model)[0].state.current.mask.flatten().tolist()
    assert first != second
    assert model.feedback_statistics() == {"open_tokens": float(first > 0), "mean_mask": first}


def test_encoder_and_decoder() -> None:
    model = steered(tiny_model(tf.T5ForConditionalGeneration))
    ids = inputs_of(model)["input_ids"]
    attention_mask = torch.ones_like(ids)
    attention_mask[:, 4:] = 0
    output_of(model, {"input_ids": ids, "decoder_input_ids": ids[:, :3], "attention_mask": attention_mask})
    statistics = model.feedback_statistics()
    assert list(statistics) == [
        f"{part}_{key}" for part in ("encoder", "decoder") for key in ("open_tokens", "mean_mask")
    ]
    encoder, decoder = (path.state.current.mask for path in paths_of(model))
    assert statistics["encoder_mean_mask"] == pytest.approx(encoder[:, :4].mean().item())
    assert statistics["decoder_mean_mask"] == pytest.approx(decoder.mean().item())


@pytest.mark.parametrize("model_class", [tf.ConvNextForImageClassification, tf.SwinForImageClassification])
def test_maps_of_tokens(model_class: type) -> None:
    model = inject_adapter_in_model(TopDownConfig(), tiny_model(model_class))
    output_of(model)
    statistics = feedback_statistics(model)
    assert 0.5 < statistics["open_tokens"] <= 1 and 0 < statistics["mean_mask"] < 1


def test_each_thread_has_its_own() -> None:
    model = adapted(tiny_model(tf.ViTModel), init_prompt="random")
    inputs = inputs_of(model)
    output_of(model, {"pixel_values": inputs["pixel_values"][:1]})
    expected = model.feedback_statistics()
    found: list[Statistics] = []

    def work() -> None:
        found.append(model.feedback_statistics())
        output_of(model, inputs)
        found.append(model.feedback_statistics())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert found[0] == {} and found[1] != expected and model.feedback_statistics() == expected


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_start_empty(duplicate: Callable) -> None:
    model = adapted(tiny_model(tf.ViTModel))
    output_of(model)
    copied = duplicate(model)
    assert copied.feedback_statistics() == {}
    output_of(copied)
    assert copied.feedback_statistics() == model.feedback_statistics()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM)).train()
    loss_of(model).backward()
    expected = model.feedback_statistics()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss_of(model).backward()
    assert model.feedback_statistics() == pytest.approx(expected, rel=1e-5)
    assert not paths_of(model)[0].state.current.mask.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_compiled_forward_keeps_its_mask(model_class: type) -> None:
    """In one graph, and other numbers compile nothing again."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted(tiny_model(model_class, use_cache=False, num_hidden_layers=1), init_prompt="random").train()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(model)
    for step in range(3):
        batch = {name: x.flip(-1) if step == 1 else x for name, x in inputs.items()}
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, : step + 1] = 0
        output_of(model, batch)
        expected = pytest.approx(model.feedback_statistics(), rel=1e-4)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            run(**batch).logits.sum().backward()
        assert model.feedback_statistics() == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_export_leaves_nothing_of_its_own() -> None:
    model = adapted(tiny_model(tf.ViTModel, num_hidden_layers=2))
    inputs = inputs_of(model)
    torch.export.export(model, (), inputs, strict=False)
    assert model.feedback_statistics() == {}
    output_of(model, inputs)
    assert model.feedback_statistics()["mean_mask"] > 0


# -------------------------------------------------------------------------------------------------------- the callback


class Recorder(tf.TrainerCallback):
    """Stands for TensorBoard and the like: a callback that was there before."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step} | logs)


def logging_trainer(model: PeftModel, folder: Path, **options: Any) -> tuple[tf.Trainer, Recorder]:
    trainer = trainer_for(model, folder, max_steps=6, logging_steps=2, eval_steps=3, save_strategy="no", **options)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(FeedbackCallback(trainer))
    return trainer, recorder


@pytest.mark.parametrize("variational_weight", [0.0, 0.5])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_callback_logs_with_the_trainer(
    model_class: type, variational_weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Tensor] = []
    statistics = toast_peft.callback.mask_statistics
    monkeypatch.setattr(
        toast_peft.callback, "mask_statistics", lambda mask, *others: calls.append(mask) or statistics(mask, *others)
    )
    model = new_model(model_class, variational_weight=variational_weight)
    trainer, recorder = logging_trainer(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*turned away")
        trainer.train()
    for logs in (recorder.logs, trainer.state.log_history):
        ours = [entry for entry in logs if "feedback_open_tokens" in entry]
        assert [entry["step"] for entry in ours] == [2, 4, 6]
        assert all(0 < entry["feedback_mean_mask"] < entry["feedback_open_tokens"] <= 1 for entry in ours)
        assert all(("variational_loss" in entry) == (variational_weight > 0) for entry in ours)
        assert all(entry.get("variational_loss", 1) > 0 for entry in ours)
    assert len(calls) == 3  # nothing is computed in other steps
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]


def test_callback_warns_once_when_no_token_is_open(tmp_path: Path) -> None:
    model = new_model(tf.ViTForImageClassification)
    with torch.no_grad():  # away from all tokens, which share a direction
        model.get_base_model().vit.layernorm.bias.add_(10)
        paths_of(model)[0].selection.topdown_prompt["default"].weight.fill_(-1)
    trainer, _ = logging_trainer(model, tmp_path, learning_rate=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "turned away" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].startswith("At step 2") and "lower learning rate" in messages[0]
    assert "(open_tokens is 0)" in messages[0] and "initialize_feedback" in messages[0]


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_pictures_are_drawn_beside_the_same_training(model_class: type, tmp_path: Path) -> None:
    weights, histories = [], []
    for draws in (False, True):
        torch.manual_seed(0)
        model = new_model(model_class)
        trainer = trainer_for(model, tmp_path, max_steps=5, logging_steps=1, eval_strategy="no", save_strategy="no")
        samples = inputs_of(model, batch_size=2) if draws else None
        trainer.add_callback(FeedbackCallback(trainer, samples, picture_steps=2))
        trainer.train()
        weights.append(dict(model.named_parameters()))
        histories.append(
            [{n: v for n, v in entry.items() if "train_" not in n} for entry in trainer.state.log_history]
        )
    assert histories[0] == histories[1]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    names = sorted(path.name for path in (tmp_path / "feedback").iterdir())
    assert names == [f"step_00000{step}.png" for step in (0, 2, 4, 5)]
    assert all((tmp_path / "feedback" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_pictures_go_to_tensorboard_and_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages themselves, as both close their reports before other callbacks see the end of the training."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip("trackio")
    model = new_model(tf.ViTForImageClassification)
    options = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    reports = {"report_to": ["tensorboard", "trackio"], "project": "pictures", "run_name": "first"}
    trainer = trainer_for(model, tmp_path, **options, **reports)
    trainer.add_callback(FeedbackCallback(trainer, inputs_of(model, batch_size=2), picture_steps=2))
    trainer.train()
    drawn = {step: (tmp_path / "feedback" / f"step_{step:06d}.png").read_bytes() for step in (0, 2, 3)}

    [events] = tmp_path.rglob("events.out.tfevents.*")
    reported = accumulator.EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload()
    assert [image.step for image in reported.Images("feedback")] == [0, 2, 3]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in reported.Images("feedback"))
    assert [scalar.step for scalar in reported.Scalars("train/feedback_open_tokens")] == [1, 2, 3]

    with closing(sqlite3.connect(tmp_path / "trackio" / "pictures.db")) as database:
        logged = [json.loads(metrics) for [metrics] in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    pictures = {metrics["train/global_step"]: metrics["feedback"] for metrics in logged if "feedback" in metrics}
    media = tmp_path / "trackio" / "media"
    assert {step: (media / picture["file_path"]).read_bytes() for step, picture in pictures.items()} == drawn
    assert sum("train/feedback_open_tokens" in metrics for metrics in logged) == 3

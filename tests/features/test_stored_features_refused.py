"""Stored pass 1: its files, and a sentence where it would be another one than that of the training."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from toast_peft import feature_shards, store_features

from ..helpers import CACHE, adapted, assert_state_is, leaves_untouched, paths_of, state_of, steered
from ..zoo import tiny_model
from .test_stored_features import (
    ROWS,
    Rows,
    all_of,
    assert_exact,
    exact_model,
    loss_and_gradients,
    pad_on,
    rows_of,
    sentences,
    without,
)

# ---------------------------------------------------------------------------------------------------------- the files


class Interrupted(list):
    """Rows that are interrupted at the fifth, and counted."""

    def __init__(self, rows: Rows, stop: int | None = 4) -> None:
        super().__init__(rows)
        self.read: list[int] = []
        self.stop = stop

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.stop:
            raise KeyboardInterrupt
        self.read.append(index)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator:
        raise NotImplementedError


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification, feedback_to=2)
    rows = rows_of(model)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        store_features(model, Interrupted(rows), tmp_path / "a", batch_size=2)
    assert_state_is(model, before)
    again = Interrupted(rows, stop=None)
    stored = store_features(model, again, tmp_path / "a", batch_size=3)
    assert again.read == [0, 0, 4, 5]
    whole = store_features(model, rows, tmp_path / "b")
    assert len(stored.shards.starts) == 2 and len(whole.shards.starts) == 1
    for index in range(ROWS):
        found, expected = stored.shards[index], whole.shards[index]
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-10)
        assert found.checksum == expected.checksum
    opened = Interrupted(rows, stop=None)
    store_features(model, opened, tmp_path / "a")
    assert opened.read == [0, 0]


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 1)
    model = exact_model(tf.ViTForImageClassification)
    stored = store_features(model, rows_of(model), tmp_path, batch_size=2)
    assert stored.shards.starts == [0, 2, 4]
    batch = all_of(stored)
    assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)))
    assert {path.name for path in tmp_path.iterdir()} == {
        "features.json",
        *(f"rows_00000000{start}.safetensors" for start in (0, 2, 4)),
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "rows_000000002.safetensors").unlink(), "no file with the rows from 2 to 3"),
        (lambda path: (path / "rows_000000004.safetensors").write_bytes(b"no"), "cannot be read .*Delete it and all"),
        (lambda path: (path / "features.json").write_text("{"), "is no JSON .*delete the folder"),
        (lambda path: (path / "features.json").unlink(), r"no features\.json; expected both"),
    ],
    ids=["missing", "damaged", "damaged key", "missing key"],
)
def test_damaged_files(damage: Callable, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 1)
    model = exact_model(tf.ViTForImageClassification)
    store_features(model, rows_of(model), tmp_path, batch_size=2)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        store_features(model, rows_of(model), tmp_path)


def other_base(model: PeftModel) -> None:
    with torch.no_grad():
        model.get_parameter("base_model.model.vit.layers.1.mlp.fc1.bias")[0] += 1e-6


@pytest.mark.parametrize(
    ("options", "change", "rows", "message"),
    [
        ({}, other_base, ROWS, "sha256 was "),
        ({"feedback_from": 3}, None, ROWS, "feedback_from was 4, is 3"),
        ({"feedback_to": 1}, None, ROWS, "feedback_to was 0, is 1"),
        ({"normalize_features": False}, None, ROWS, "normalize_features was True, is False"),
        ({}, nn.Module.half, ROWS, "computed_in was 'float32', is 'float16'"),
        ({}, None, ROWS - 1, "rows was 6, is 5"),
    ],
    ids=["base", "early", "late", "norm", "dtype", "rows"],
)
def test_features_of_something_else(options: dict, change: Any, rows: int, message: str, tmp_path: Path) -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    store_features(model, rows_of(model), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = steered(tiny_model(tf.ViTForImageClassification), **options)
    if change is not None:
        change(model)
    with leaves_untouched_in(model), pytest.raises(ValueError, match=f"something else: .*{message}.*another folder"):
        store_features(model, rows_of(model, rows), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def leaves_untouched_in(model: nn.Module) -> Any:
    """As `leaves_untouched`, for models of other dtypes than float32, which its inputs have."""
    model.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    return leaves_untouched(model)


def cast_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cast = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in kwargs.items()}
    return args, cast


def test_a_new_head_and_another_adapter_have_the_same_features(tmp_path: Path) -> None:
    for seed, options in enumerate(({"r": 4}, {"trainable_parts": ["prompt"]})):
        model = adapted(tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"], **options)
        nn.init.normal_(model.get_base_model().classifier.original_module.weight, std=seed + 1)
        rows = Interrupted(rows_of(model), stop=None)
        store_features(model, rows, tmp_path)
        assert (rows.read == [0, 0]) == bool(seed)


# ------------------------------------------------------------------------------------------------------------ refusals


def with_lora(base: nn.Module) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base, adapter_name="below")


class Noisy(list):
    """Rows of images with augmentation."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: x + torch.randn_like(x) for name, x in super().__getitem__(index).items()}


def disabled(model: PeftModel) -> PeftModel:
    model.base_model.disable_adapter_layers()
    return model


def only(model_class: type, **options: Any) -> Callable[[], PeftModel]:
    return lambda: steered(tiny_model(model_class), **options)


_VIT = tf.ViTForImageClassification
REFUSED = {
    "encoder-decoder": (only(tf.T5ForConditionalGeneration), {}, "2 stacks of blocks .*encoder-decoder"),
    "a ConvNet": (only(tf.ResNetForImageClassification), {}, "its feedback is a map"),
    "a hierarchy": (only(tf.SwinForImageClassification), {}, "its feedback is a map"),
    "no adapter": (lambda: tiny_model(_VIT), {}, "0 stacks of blocks"),
    "disabled": (lambda: disabled(only(_VIT)()), {}, "of which 0 are active"),
    "LoRA": (lambda: steered(with_lora(tiny_model(_VIT))), {}, "is trained, so that pass 1 changes"),
    "embeddings": (only(_VIT, modules_to_save=["vit.embeddings"]), {}, "is trained, so that pass 1 changes"),
    "final norm": (only(_VIT, modules_to_save=["vit.layernorm"]), {}, "is trained, so that pass 1 changes"),
    "augmentation": (only(_VIT), {"dataset": Noisy}, "row 0 are not those .*augmentation"),
    "a stream": (only(_VIT), {"dataset": iter}, "is a list_iterator; expected one with a length"),
    "empty": (only(_VIT), {"dataset": lambda rows: []}, "a length above 0"),
    "no dicts": (only(_VIT), {"dataset": lambda rows: [r["pixel_values"] for r in rows]}, "rows of the type Tensor"),
    "other columns": (
        only(_VIT),
        {"dataset": lambda rows: [{"image": 1} for _ in rows]},
        r"gave \['image'\]; expected",
    ),
    "no rows": (
        only(_VIT),
        {"data_collator": lambda rows: {"pixel_values": rows[0]["pixel_values"].repeat(3, 1, 1, 1)}},
        "in a batch of 1 rows; expected an entry",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_stored(case: str, tmp_path: Path) -> None:
    make_model, options, message = REFUSED[case]
    model = make_model()
    make_dataset = options.get("dataset", list)
    collator = {name: value for name, value in options.items() if name == "data_collator"}
    with leaves_untouched(model), pytest.raises(ValueError, match=message):
        store_features(model, make_dataset(rows_of(model)), tmp_path / "features", **collator)
    assert not (tmp_path / "features").exists()


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    model = only(_VIT)()
    rows = rows_of(model)
    with pytest.raises(ValueError, match="are offloaded or not loaded; expected all in memory"):
        store_features(model.to("meta"), rows, tmp_path)


def test_other_pixels_are_refused(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    rows = rows_of(model)
    stored = store_features(model, rows, tmp_path)
    rows[3] = {"pixel_values": rows[3]["pixel_values"].flip(-1)}
    stored.collate([stored[2], stored[4]])
    with pytest.raises(ValueError, match="row 3 are not those .*augmentation"):
        stored.collate([stored[2], stored[3]])
    with pytest.raises(ValueError, match="1 of 2 rows have stored features"):
        stored.collate([stored[2], rows[0]])
    with pytest.raises(IndexError):
        stored[ROWS]
    with pytest.raises(ValueError, match=r"data_collator=stored\.collate"):
        tf.default_data_collator([stored[2], stored[4]])


def test_a_frozen_adapter_below_that_is_switched_off_is_noticed(tmp_path: Path) -> None:
    base = inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        tiny_model(_VIT),
        adapter_name="below",
    )
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model = steered(base.requires_grad_(False))
    base.requires_grad_(False)
    store_features(model, rows_of(model), tmp_path)
    for module in base.modules():
        if hasattr(module, "lora_A"):
            module._disable_adapters = True
    with pytest.raises(ValueError, match="row 0 .* are not those that the model computes now"):
        store_features(model, rows_of(model), tmp_path)


STEPS: dict[str, tuple[Callable[[PeftModel, dict], Any], str]] = {
    "a cache": (lambda model, batch: model(**batch, **{CACHE: tf.DynamicCache()}), "together with a key-value cache"),
    "use_cache": (lambda model, batch: model(**batch, use_cache=True), "together with a key-value cache"),
    "other shape": (
        lambda model, batch: model(**batch | {"topdown_features": batch["topdown_features"][:, :, 0]}),
        r"expected \[rows, tokens, 1 or 2, channels\]",
    ),
    "fewer tokens": (
        lambda model, batch: model(**batch | {"topdown_features": batch["topdown_features"][:, :4]}),
        "expected the same",
    ),
    "trained below": (
        lambda model, batch: model.requires_grad_(True)(**batch),
        "depends on something that is trained",
    ),
    "generation": (lambda model, batch: model.generate(**batch, max_new_tokens=2), "together with a key-value cache"),
}


@pytest.mark.parametrize("case", STEPS)
def test_refused_in_a_step(case: str, tmp_path: Path) -> None:
    step, message = STEPS[case]
    model = exact_model(tf.LlamaForCausalLM)
    batch = all_of(store_features(model, rows_of(model), tmp_path))
    with pytest.raises(ValueError, match=message):
        step(model, batch)
    assert paths_of(model)[0].state.current.stored is None


def test_features_of_another_adapter_are_refused(tmp_path: Path) -> None:
    model = exact_model(tf.ViTForImageClassification)
    batch = all_of(store_features(model, rows_of(model), tmp_path / "full"))
    early = copy.copy(model.peft_config["default"])
    early.feedback_from = 2
    model.add_adapter("early", early)
    model.set_adapter("early")
    with pytest.raises(ValueError, match="feedback_from=4, .* the active one has feedback_from=2"):
        model(**batch)
    with pytest.raises(ValueError, match="Load the model anew"):
        store_features(model.double(), rows_of(model), tmp_path / "early")


# ------------------------------------------------------------------------------------------------------------ padding


def test_padding_that_changes_the_features_is_refused(tmp_path: Path) -> None:
    """A GPT-2 counts the positions of padding on the left."""
    model = exact_model(tf.GPT2LMHeadModel).eval()
    store_features(model, sentences(), tmp_path / "right", data_collator=pad_on("right"))
    with leaves_untouched(model), pytest.raises(ValueError, match="depends on its padding, .*pad on the right"):
        store_features(model, sentences(), tmp_path / "left", data_collator=pad_on("left"))


def test_a_loss_that_depends_on_padding_is_refused(tmp_path: Path) -> None:
    """That of a causal model predicts the first token of a row from the padding before it."""
    model, collate = exact_model(tf.LlamaForCausalLM, feedback_to=2), pad_on("left", first_label=True)
    with leaves_untouched(model), pytest.raises(ValueError, match="its first token has a label, .*pad on the right"):
        store_features(model, sentences(), tmp_path, data_collator=collate)
    stored = store_features(model, sentences(), tmp_path / "one by one", batch_size=1, data_collator=pad_on("left"))
    stored.data_collator = collate
    with pytest.raises(ValueError, match="its first token has a label"):
        all_of(stored)


class MeanOfTokens(tf.LlamaModel):
    """Takes the mean of all tokens, of padding too."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": super().forward(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)}


def test_outputs_that_depend_on_padding_are_refused(tmp_path: Path) -> None:
    base = MeanOfTokens(tiny_model(tf.LlamaForCausalLM).config)
    model = adapted(base, feedback_to=2)
    with pytest.raises(ValueError, match="MeanOfTokens computes of a row depends on its padding"):
        store_features(model, sentences(), tmp_path, data_collator=pad_on("right"))


def test_padding_without_a_mask_is_refused(tmp_path: Path) -> None:
    def pad(rows: Rows) -> dict[str, torch.Tensor]:
        return {name: x for name, x in pad_on("right")(rows).items() if name != "attention_mask"}

    model = exact_model(tf.LlamaForCausalLM)
    stored = store_features(model, sentences(), tmp_path, batch_size=1, data_collator=pad)
    with pytest.raises(ValueError, match="are not those that the stored features were computed from"):
        all_of(stored)

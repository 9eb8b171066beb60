"""Stored pass 1: the same numbers without running it, and a sentence where it would be another one."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn
from transformers import Trainer, TrainingArguments

from toast_peft import StoredFeatures, feature_shards, initialize_feedback, store_features

from ..helpers import (
    CACHE,
    adapted,
    assert_state_is,
    blocks_of,
    counted_block_calls,
    gradients,
    leaves_untouched,
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


@pytest.mark.parametrize("variant", ["full", "late"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.OPTForCausalLM])
def test_rows_are_padded_as_the_batch_is(model_class: type, side: str, variant: str, tmp_path: Path) -> None:
    model = exact_model(model_class, **VARIANTS[variant])
    stored = store_features(model, sentences(), tmp_path, batch_size=2, data_collator=pad_on(side))
    assert [len(stored.shards[index].features) for index in range(ROWS)] == LENGTHS
    for indices in ([1, 0, 4], [2, 5], [3, 2, 1, 0]):
        batch = stored.collate([stored[index] for index in indices])
        # A LLaMA turns by positions in float32, which padding on the left moves.
        atol = 1e-6 if side == "left" and model_class is tf.LlamaForCausalLM else 1e-10
        assert_exact(loss_and_gradients(model, batch), loss_and_gradients(model, without(batch)), atol)


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


# ------------------------------------------------------------------------------------------------------------ the files


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


# ------------------------------------------------------------------------------------------------------ leaving nothing


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

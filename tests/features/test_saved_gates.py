"""Saved gates: however they are loaded, what a gate knows of the model comes with its weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from toast_peft import TopDownConfig, fit_gate
from toast_peft.core.gate import Gate

from ..helpers import assert_same, assert_state_is, output_of, paths_of, state_of, steered, takes_adapters
from ..zoo import tiny_model
from .test_gate_fitting import REFERENCE, TARGET

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter .* as few as")
LLAMA, BERT = tf.LlamaForCausalLM, tf.BertForSequenceClassification


def fitted(model_class: type = LLAMA) -> PeftModel:
    model = steered(tiny_model(model_class), gate="sequence")
    fit_gate(model, TARGET, REFERENCE)
    return model


def new(model_class: type = LLAMA) -> PeftModel:
    return get_peft_model(tiny_model(model_class), TopDownConfig(gate="sequence", init_weights=False)).eval()


def gate_of(model: nn.Module) -> Gate:
    return paths_of(model)[0].selection.topdown_gate["default"]


def assert_is_loaded(loaded: nn.Module, model: PeftModel) -> None:
    """The gate looks at the same tokens and is open for the same."""
    assert gate_of(loaded).is_causal == gate_of(model).is_causal
    for batch in (TARGET[0], REFERENCE[0]):
        assert_same(output_of(loaded, batch), output_of(model, batch))


def save_as_before(model: PeftModel, folder: Path) -> None:
    """Without what tells a causal gate in the file, as adapters were saved before it was there."""
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    weights = {name: x for name, x in load_file(file).items() if not name.endswith("topdown_gate.causal")}
    save_file(weights, file, {"format": "pt"})


LOADS: dict[str, Callable[[PeftModel, PeftModel, Path], object]] = {
    "load_adapter": lambda loaded, model, folder: loaded.load_adapter(folder, "default"),
    "load_state_dict": lambda loaded, model, folder: loaded.load_state_dict(model.state_dict()),
    "assigned": lambda loaded, model, folder: loaded.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "functions of PEFT": lambda loaded, model, folder: set_peft_model_state_dict(
        loaded, get_peft_model_state_dict(model)
    ),
}


@pytest.mark.parametrize("model_class", [LLAMA, BERT])
@pytest.mark.parametrize("load", LOADS)
def test_loaded_over_another(load: str, model_class: type, tmp_path: Path) -> None:
    """A gate that is not fitted, or was fitted to something else."""
    model, loaded = fitted(model_class), new(model_class)
    model.save_pretrained(tmp_path)
    LOADS[load](loaded, model, tmp_path)
    assert_is_loaded(loaded, model)
    gate_of(loaded).set_causal(not gate_of(model).is_causal)
    LOADS[load](loaded, model, tmp_path)
    assert_is_loaded(loaded, model)


@pytest.mark.filterwarnings("error:The gate of the TOAST adapter .* never fitted")
@takes_adapters
def test_loaded_over_another_it_is_saved_with_its_config(tmp_path: Path) -> None:
    """Which is all that transformers reads before it puts the weights into their places."""
    model, loaded = fitted(), new()
    model.save_pretrained(tmp_path / "first")
    loaded.load_adapter(tmp_path / "first", "default")
    loaded.save_pretrained(tmp_path / "second")
    assert_is_loaded(PeftModel.from_pretrained(tiny_model(LLAMA), tmp_path / "second").eval(), model)
    base = tiny_model(LLAMA)
    base.load_adapter(str(tmp_path / "second"))
    assert_is_loaded(base.eval(), model)


def test_training_is_resumed_without_fitting_again(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for batch in TARGET for ids in batch["input_ids"]]

    def train(model: PeftModel, steps: int, resumed: str | None = None) -> PeftModel:
        options = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        args = tf.TrainingArguments(str(tmp_path), max_steps=steps, **options)
        tf.Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=resumed)
        return model.eval()

    gate = gate_of(train(fitted(), 2))
    resumed = gate_of(train(new(), 2, str(tmp_path / "checkpoint-1")))
    assert resumed.is_causal is True
    assert all(torch.equal(parameter, gate.get_parameter(name)) for name, parameter in resumed.named_parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("model_class", [LLAMA, BERT])
def test_saved_before_it_was_in_the_file(model_class: type, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """The config says it, of an adapter that is loaded into a base model."""
    model = fitted(model_class)
    save_as_before(model, tmp_path)
    base = tiny_model(model_class)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_is_loaded(loaded, model)
    loaded.load_adapter(tmp_path, "default")
    assert_is_loaded(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    other = new(model_class)
    other.load_adapter(tmp_path / "again", "default")
    assert_is_loaded(other, model)


@takes_adapters
def test_saved_before_it_was_in_the_file_and_loaded_by_transformers(tmp_path: Path) -> None:
    model, base = fitted(), tiny_model(LLAMA)
    save_as_before(model, tmp_path)
    base.load_adapter(str(tmp_path))
    assert_is_loaded(base.eval(), model)


def test_saved_before_and_not_known_is_refused(tmp_path: Path) -> None:
    loaded = new()
    save_as_before(fitted(), tmp_path)
    before = state_of(loaded)
    with pytest.raises(ValueError, match=r"saved without .*topdown_gate\.default\.causal; expected it"):
        loaded.load_adapter(tmp_path, "default")
    assert_state_is(loaded, before)


def test_state_of_before_is_loaded_where_it_is_known() -> None:
    model, loaded = fitted(), new()
    state = {name: x for name, x in model.state_dict().items() if not name.endswith("causal")}
    with pytest.raises(ValueError, match=r"saved without .*topdown_gate\.default\.causal; expected it"):
        loaded.load_state_dict(state, strict=False)
    gate_of(loaded).set_causal(True)
    loaded.load_state_dict(state)
    assert_is_loaded(loaded, model)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter .* never fitted")
def test_saved_before_it_was_fitted(tmp_path: Path) -> None:
    model, loaded = new(), new()
    save_as_before(model, tmp_path)
    for other in (PeftModel.from_pretrained(tiny_model(LLAMA), tmp_path), loaded):
        other.load_adapter(tmp_path, "default")
        assert gate_of(other).is_causal is None
        assert_same(output_of(other.eval()), output_of(model))


def test_moved_and_copied_it_knows_the_same() -> None:
    model = fitted().to(torch.bfloat16)
    loaded = new().to(torch.bfloat16)
    loaded.load_state_dict(model.state_dict())
    assert gate_of(loaded).is_causal is True

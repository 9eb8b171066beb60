"""`torch.compile`: one graph for both passes, none but the first step compiles, same numbers."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from ..helpers import adapted, compiles_copies, gradients, output_of, steered
from ..zoo import inputs_of, tiny_model

pytestmark = pytest.mark.slow
NUM_STEPS = 3
# On models as small as can be: each block is compiled once for each pass. For "full" code is generated. In "middle"
# the first of three blocks runs in pass 1 only, the second in both, the third in pass 2 only.
VARIANTS = {"full": {"num_blocks": 1}, "lite": {"r": 4}, "middle": {"feedback_from": 2, "feedback_to": 1}}
# Inductor needs a C++ compiler on CPU; without one the graph is at least captured and differentiated.
BACKEND = "inductor" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model: PeftModel, backend: str = "aot_eager") -> Callable[..., Any]:
    """The compiled model; a break of the graph is an error."""
    return torch.compile(model, fullgraph=True, backend=backend)


def backend_of(generated: bool) -> str:
    """Code is generated in one test of inference and in one of training, as that is slow."""
    return BACKEND if generated else "aot_eager"


def compile_only_once(step: int) -> torch.compiler.set_stance:
    """After the first step, compiling is an error."""
    return torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile")


def steered_model(model_class: type, num_blocks: int | None = None, **options: Any) -> PeftModel:
    """A model with an adapter."""
    num_blocks = num_blocks or 1 + options.get("feedback_from", 1)
    # A ViT otherwise guesses the problem type in its first forward and stores it, for which it is compiled twice.
    base = tiny_model(model_class, problem_type="single_label_classification", num_hidden_layers=num_blocks)
    return steered(base, **options)


def training_batch(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Other inputs in each step, with labels."""
    inputs = inputs_of(model)
    if "pixel_values" in inputs:
        return {"pixel_values": inputs["pixel_values"] + step, "labels": torch.tensor([step % 2, 1])}
    ids = inputs["input_ids"].roll(step, 1)
    return {"input_ids": ids, "labels": ids, "use_cache": compiles_copies()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "variant"), [(tf.ViTForImageClassification, "full"), (tf.LlamaForCausalLM, "middle")]
)
def test_forward(model_class: type, variant: str) -> None:
    model = steered_model(model_class, **VARIANTS[variant])
    run = compiled(model, backend_of(variant == "full"))
    for step in range(NUM_STEPS):
        inputs = training_batch(model, step)
        with compile_only_once(step), torch.no_grad():
            assert_close(run(**inputs).logits, output_of(model, inputs | {"labels": None}))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("model_class", "variant"),
    [
        (tf.LlamaForCausalLM, "full"),
        (tf.ViTForImageClassification, "lite"),
        (tf.ViTForImageClassification, "middle"),
    ],
)
def test_training_steps(model_class: type, variant: str) -> None:
    models = [steered_model(model_class, **VARIANTS[variant]).train() for _ in range(2)]
    forwards = [models[0], compiled(models[1], backend_of(variant == "full"))]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in models]
    for step in range(NUM_STEPS):
        losses = []
        for model, forward, optimizer in zip(models, forwards, optimizers, strict=True):
            with compile_only_once(step):
                loss = forward(**training_batch(model, step)).loss
                loss.backward()
            losses.append(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert_close(losses[1], losses[0])
    assert losses[0].requires_grad
    for name, parameter in models[0].named_parameters():
        assert_close(models[1].get_parameter(name), parameter)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("model_class", "use_reentrant", "num_blocks"),
    [(tf.ViTForImageClassification, False, 2), (tf.LlamaForCausalLM, True, 1)],
)
def test_gradient_checkpointing(model_class: type, use_reentrant: bool, num_blocks: int) -> None:
    plain, model = (steered_model(model_class, num_blocks).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # PEFT's hook on the embeddings, which only adapters inside of the blocks need, does not compile in one graph.
    model.get_base_model().disable_input_require_grads()
    # With a cache transformers would log that it is not used, which does not compile either.
    no_cache = {"use_cache": False} if model_class is tf.LlamaForCausalLM else {}
    for forward, trained in ((plain, plain), (compiled(model), model)):
        forward(**training_batch(trained, 0) | no_cache).loss.backward()
    expected = gradients(plain)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


def as_people_call_it(model: PeftModel, how: str) -> Callable[..., Any]:
    if how == "model.compile()":
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize(
    ("model_class", "how", "eager_call_before"),
    [
        (tf.ViTForImageClassification, "torch.compile", True),
        (tf.LlamaForCausalLM, "model.compile()", False),
    ],
)
def test_training_with_evaluation_in_between(model_class: type, how: str, eager_call_before: bool) -> None:
    plain, model = (steered_model(model_class, num_blocks=1, r=4).train() for _ in range(2))
    if eager_call_before:
        model(**training_batch(model, 0))
    run = as_people_call_it(model, how)
    for step in range(2):
        for forward, trained in ((plain, plain), (run, model)):
            trained.train().zero_grad()
            forward(**training_batch(trained, step)).loss.backward()
        expected = gradients(plain)
        for name, gradient in gradients(model).items():
            assert_close(gradient, expected[name])
        plain.eval(), model.eval()
        with torch.no_grad():
            found = run(**training_batch(model, step)).logits
        assert_close(found, output_of(plain, training_batch(plain, step) | {"labels": None}))


@pytest.mark.parametrize(
    ("model_class", "use_reentrant"), [(tf.ViTForImageClassification, True), (tf.LlamaForCausalLM, False)]
)
def test_gradient_checkpointing_as_people_switch_it_on(model_class: type, use_reentrant: bool) -> None:
    """With the hook that PEFT adds and the warning that transformers gives, which break the graph.

    `train` comes last, as in each step of the Trainer, and nothing is compiled again in the second step.
    """
    plain, model = (steered_model(model_class, num_blocks=1).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    run = as_people_call_it(model, "torch.compile")
    for step in range(2):
        for forward, trained in ((plain, plain), (run, model)):
            trained.train().zero_grad()
            with compile_only_once(step):
                forward(**training_batch(trained, step)).loss.backward()
        expected = gradients(plain)
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
        for name, gradient in gradients(model).items():
            assert_close(gradient, expected[name])


def test_dropout() -> None:
    """Pass 1 has none also when it is compiled, so a no-op is the base model with the same seed."""
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    base = tiny_model(
        tf.ViTForImageClassification, problem_type="single_label_classification", num_hidden_layers=2, **rates
    ).train()
    model = adapted(copy.deepcopy(base), feedback_to=1)
    found, expected = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (model, base))
    for step in range(2):
        losses = []
        for forward in (found, expected):
            torch.manual_seed(step)
            losses.append(forward(**training_batch(base, step)).loss)
        assert_close(*losses)
    assert all(module.training for module in model.modules())


def test_trainer(tmp_path: Path) -> None:
    """`TrainingArguments(torch_compile=True)`: training steps, and an evaluation after each epoch."""
    results = []
    for compiles in (False, True):
        model = steered_model(tf.LlamaForCausalLM, num_blocks=1, task_type="CAUSAL_LM")
        rows = [{"input_ids": ids, "labels": ids} for ids in inputs_of(model, batch_size=4)["input_ids"]]
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            eval_strategy="epoch",
            report_to=[],
            use_cpu=True,
            torch_compile=compiles,
            torch_compile_backend="aot_eager" if compiles else None,
        )
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        results.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    assert len(results[0]) == 2 and results[0][0] != results[0][1]
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_disabling_the_adapter_compiles_the_base_model() -> None:
    """The compiled model follows `disable_adapter`, and going back and forth compiles nothing again."""
    base = tiny_model(tf.ViTForImageClassification, num_hidden_layers=1)
    base_output = output_of(base)
    model = steered(base)
    expected, inputs = output_of(model), inputs_of(model)
    run = compiled(model)
    for step in range(4):
        # Compiled again after the first switch: PEFT's layers have an attribute only since then.
        with compile_only_once(max(step - 1, 0)), torch.no_grad():
            assert_close(run(**inputs).logits, expected)
            with model.disable_adapter():
                assert_close(run(**inputs).logits, base_output)
    assert (expected - base_output).abs().max() > 0.1

"""Two threads run one model at the same time, one with its adapter and one without."""

import threading

import pytest
import torch

from ..helpers import blocks_of, output_of, steered
from ..zoo import VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_adapter_disabled_by_another_thread_during_a_forward(model_class: type, in_pass: int, variant: str) -> None:
    """Switching is for the whole model, as in all of PEFT; a forward that has begun ends as it began."""
    base = tiny_model(model_class)
    base_output = output_of(base)
    model = steered(base, **VARIANTS[variant])
    expected, inputs = output_of(model), inputs_of(model)
    calls: list[int] = []
    without: list[torch.Tensor] = []

    def run_without_adapter() -> None:
        with model.disable_adapter():
            without.append(output_of(model, inputs))

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == in_pass:
            thread = threading.Thread(target=run_without_adapter)
            thread.start()
            thread.join(timeout=60)

    # Block 1 runs in both passes, in variants that skip it at least once.
    with blocks_of(model)[1].register_forward_hook(interrupt):
        assert torch.equal(output_of(model, inputs), expected)
    assert len(without) == 1 and torch.equal(without[0], base_output)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_adapter_enabled_by_another_thread_during_a_forward_without_it(model_class: type, checkpointing: bool) -> None:
    base = tiny_model(model_class)
    base_output = output_of(base)
    model = steered(base)
    expected = output_of(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()

    def enable(*_: object) -> None:
        thread = threading.Thread(target=model.base_model.enable_adapter_layers)
        thread.start()
        thread.join(timeout=60)

    model.base_model.disable_adapter_layers()
    with blocks_of(model)[1].register_forward_hook(enable):
        found = model(**inputs_of(model))[0]
    torch.testing.assert_close(found, base_output)
    torch.testing.assert_close(output_of(model.eval()), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_base_model_and_adapted_model_share_their_weights(model_class: type) -> None:
    """Two models on the same weights, one adapted, run at the same time without a switch."""
    plain, base = tiny_model(model_class), tiny_model(model_class)
    inputs = inputs_of(plain)
    for name, parameter in plain.named_parameters():
        base.get_parameter(name).data = parameter.data
    model = steered(base)
    expected = {"with": output_of(model, inputs), "without": output_of(plain, inputs)}
    results: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    together = threading.Barrier(2)

    def work(name: str, run: torch.nn.Module) -> None:
        for _ in range(20):
            together.wait(timeout=60)
            results[name].append(output_of(run, inputs))

    threads = [threading.Thread(target=work, args=pair) for pair in (("with", model), ("without", plain))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outputs in results.items():
        assert len(outputs) == 20 and all(torch.equal(output, expected[name]) for output in outputs)

"""ALBERT: a block of the list runs several times, with the same weights and so with the same feedback."""

import pytest
import torch
import transformers as tf
from torch import nn

from toast_peft import initialize_feedback

from ..helpers import adapted, loss_of, output_of, paths_of, steered
from ..zoo import add_noise, inputs_of

VALUES = r".*attention\.value"


def albert(groups: int) -> nn.Module:
    """Four layers, of as many different ones as there are groups."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "embedding_size": 16}
    model = tf.AlbertModel(tf.AlbertConfig(**sizes, **tokens, num_hidden_groups=groups))
    add_noise(*model.parameters())
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"feedback_from": 1}, {"feedback_to": 1}], ids=["full", "early", "late"])
def test_every_repeat_gets_the_feedback_of_its_block(options: dict[str, int]) -> None:
    model = steered(albert(2), target_modules=VALUES, **options)
    feedback: dict[int, torch.Tensor] = {}
    [path] = paths_of(model)
    path.register_forward_hook(lambda path, args, td: feedback.update(td))
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    for index, group in enumerate(model.encoder.albert_layer_groups):
        for name in ("query", "value"):
            seen = inputs[index, name] = []
            layer = getattr(group.albert_layers[0].attention, name)
            layer.register_forward_hook(lambda layer, args, output, seen=seen: seen.append(args[0]))
    output_of(model)
    assert feedback
    for index, td in feedback.items():
        queries, values = inputs[index, "query"], inputs[index, "value"]
        assert len(queries) == len(values) == 4 and td.abs().max() > 0.01  # two repeats, two passes
        for query, value in list(zip(queries, values, strict=True))[-2:]:
            torch.testing.assert_close(value, query + td)


@pytest.mark.parametrize("options", [{}, {"feedback_from": 1}, {"feedback_to": 1}], ids=["full", "early", "late"])
def test_starts_as_the_base_model(options: dict[str, int]) -> None:
    """Also what is recorded: the hidden states after each repeat."""
    base = albert(2)
    inputs = inputs_of(base) | {"output_hidden_states": True}
    expected = base(**inputs)
    found = adapted(base, target_modules=VALUES, **options)(**inputs)
    assert torch.equal(found[0], expected[0]) and len(found.hidden_states) == len(expected.hidden_states) == 5
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))


def test_gradients_reach_every_trained_part() -> None:
    model = steered(albert(1), target_modules=VALUES)
    loss_of(model).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_variational_loss_is_refused() -> None:
    model = adapted(albert(1), target_modules=VALUES, variational_weight=0.1).train()
    with pytest.raises(NotImplementedError, match="`variational_weight` is set, but block 0 runs several times"):
        model(**inputs_of(model))
    different = adapted(albert(4), target_modules=VALUES, variational_weight=0.1).train()
    different(**inputs_of(different))
    assert different.variational_loss() > 0


def test_initialization_sets_only_the_prompt() -> None:
    model = adapted(albert(1), target_modules=VALUES)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    initialize_feedback(model, [inputs_of(model)])
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == 1 and "topdown_prompt" in changed[0]

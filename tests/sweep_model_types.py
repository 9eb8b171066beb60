"""Goes over all model types of transformers: is an adapter right on a tiny random model of each, or refused?

    python -m tests.sweep_model_types > docs/models.md

A model type is *right* if with `TopDownConfig()`, so without any help,

- start: the new adapter changes no bit of the output, in training mode neither,
- values: in each block, its feedback changes what attention gets as values and neither its queries nor its keys,
- gradients: they reach every trained part,
- training: in training mode, where dropout is on, outputs are finite and steered, and gradients reach every part,
- fused: fused feedback gives the same output,
- cache: generation with a cache computes what generation without one does,
- loading: a saved adapter on a copy of the untouched model gives the same output.

What a model itself does not have is not checked: attention, a forward in training mode without labels, a cache. It may
be *refused*, by a sentence, before anything is changed; this needs no inputs. All else is *wrong*.
Each type runs in a process of its own, with a time limit.
"""

import argparse
import contextlib
import copy
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from toast_peft import TopDownConfig
from toast_peft.core.layers import FeedbackPath
from toast_peft.core.value_projection import ValueHooks
from toast_peft.families.convnets import CONVNETS
from toast_peft.families.hierarchies import HIERARCHIES
from toast_peft.families.model_types import ARCHITECTURES

from .kept_models import seed
from .tiny_transformers import auto_mapping_of, model_that_may_not_run, tiny_model

_TIME_LIMIT = 120  # seconds of processor time for each model type
_FOUND_BY_ROW = {*ARCHITECTURES, *CONVNETS, *HIERARCHIES}


class Row(NamedTuple):
    """What is found out about a model type."""

    model_type: str
    found: str  # row, structure, or empty
    result: str  # right, refused, wrong, not tried
    why: str = ""


class Expected(NamedTuple):
    """What the base model computes.

    Args:
        outputs: in evaluation mode.
        in_training: in training mode, `None` if it does not run in it without labels.
        generated: logits with and without a cache, `None` if it does not generate.
    """

    outputs: list[torch.Tensor]
    in_training: list[torch.Tensor] | None
    generated: tuple[torch.Tensor, torch.Tensor] | None


def model_types() -> list[str]:
    """All model types that an auto class makes a model of."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if auto_mapping_of(name))


# ------------------------------------------------------------------------------------------------------ the checks


def examine(model_type: str) -> Row:
    """Build a model of the type, adapt it and check it."""
    try:
        base, inputs = tiny_model(model_type)
    except Exception as error:  # the model itself
        return _without_inputs(model_type, f"{type(error).__name__}: {error}")
    another = copy.deepcopy(base)
    try:
        model = get_peft_model(base, TopDownConfig()).eval()
    except (ValueError, NotImplementedError) as error:  # the latter from PEFT, to LoRA as well
        return Row(model_type, "", "refused", str(error))
    except Exception as error:
        return Row(model_type, "", "wrong", f"adapting: {type(error).__name__}: {error}")
    expected = expected_of(another, inputs)
    backbones = {path.selection.topdown_config["default"].backbone_type for path in _paths(model)}
    found = "row" if backbones <= _FOUND_BY_ROW else "structure"
    checks = (
        ("start", lambda: _check_start(model, inputs, expected)),
        ("values", lambda: _check_values(model, inputs)),
        ("gradients", lambda: _check_gradients(model, inputs)),
        ("training", lambda: _check_training(model, inputs, expected)),
        ("fused", lambda: _check_fused(model, inputs)),
        ("cache", lambda: _check_cache(model, inputs, expected)),
        ("loading", lambda: _check_loading(model, inputs, expected, another)),
    )
    passed = []
    for name, check in checks:
        try:
            if check() is not False:
                passed.append(name)
        except Exception as error:
            return Row(model_type, found, "wrong", f"{name}: {type(error).__name__}: {error}")
    return Row(model_type, found, "right", ", ".join(passed))


def _without_inputs(model_type: str, why: str) -> Row:
    """Whether a model that does not run here is refused by its structure."""
    try:
        model = model_that_may_not_run(model_type)
    except Exception:  # the reason is known already
        return Row(model_type, "", "not tried", why)
    try:
        get_peft_model(model, TopDownConfig(init_prompt="random"))  # with which no model runs
    except (ValueError, NotImplementedError) as error:
        return Row(model_type, "", "refused", str(error))
    return Row(model_type, "", "not tried", why)


def expected_of(base: nn.Module, inputs: dict[str, torch.Tensor]) -> Expected:
    outputs, trained, generated = outputs_of(base, inputs), None, None
    with contextlib.suppress(Exception), in_training(base):
        trained = outputs_of(base, inputs)
    with contextlib.suppress(Exception):
        generated = _cached_and_not(base, inputs)
    return Expected(outputs, trained, generated)


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in training mode; what norms learn of the batches is forgotten."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.load_state_dict(state)


def seed_all() -> None:
    """As `transformers.set_seed(0)`: also numpy, from which speech models draw what they mask."""
    random.seed(0)
    np.random.seed(0)
    seed(0)


def outputs_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    seed_all()
    with torch.no_grad():
        return list(_tensors(model(**inputs)))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


def _paths(model: nn.Module) -> list[FeedbackPath]:
    return [module for module in model.modules() if isinstance(module, FeedbackPath)]


def _check_start(model: nn.Module, inputs: dict[str, torch.Tensor], expected: Expected) -> None:
    _assert_same(outputs_of(model, inputs), expected.outputs)
    if expected.in_training is not None:
        with in_training(model):
            _assert_same(outputs_of(model, inputs), expected.in_training)


def _assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected), "another number of outputs"
    for tensor, before in zip(found, expected, strict=True):
        # Other memory may have other rounding.
        assert torch.equal(tensor, before) or _close(tensor, before, 1e-6), "the output changes"


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Equal up to a tolerance relative to the largest entry."""
    found, expected = found.double(), expected.double()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def _steer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Put noise on the adapter, and turn each prompt to a feature, so that its effect is visible."""
    seed(1)
    for name, parameter in model.named_parameters():
        if "topdown_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))

    def turn(path: FeedbackPath, args: tuple) -> None:
        prompt = path.selection.topdown_prompt["default"].weight
        prompt.copy_(args[0].flatten(0, -2)[-1] if args[0].shape[-1] == len(prompt) else prompt)

    for path in _paths(model):  # one after the other, as a decoder's features depend on its encoder
        with path.register_forward_pre_hook(turn):
            outputs_of(model, inputs)


class AttentionSpy(TorchFunctionMode):
    """Notes what attention computes with while a module runs: queries, keys and values, or its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[torch.Tensor]] = []
        self.running = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.running and name == "scaled_dot_product_attention":
            self.calls[-1].append((*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[:3])
        elif self.running and name == "softmax":
            scores = args[0] if args else kwargs["input"]
            if isinstance(scores, torch.Tensor):
                self.calls[-1].append((scores,))
        return func(*args, **kwargs)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        def begin(module: nn.Module, args: tuple) -> None:
            self.running = True
            self.calls.append([])

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self.running = False

        with module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True), self:
            yield


def _check_values(model: nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
    """Pass 1 and pass 2 differ in each block that receives feedback by the values, and by nothing else.

    Returns:
        Whether there is attention to look at, as there is none in ConvNets.
    """
    _steer(model, inputs)
    paths = _paths(model)
    if not all(path.passes.value_hooks for path in paths):
        return False
    for path in paths:
        for hooks in path.passes.value_hooks.values():
            _check_values_of(model, inputs, path, hooks)
    return True


def _check_values_of(model: nn.Module, inputs: dict[str, torch.Tensor], path: FeedbackPath, hooks: ValueHooks) -> None:
    """The same of one block, which alone gets its feedback, so that its input is the same in both passes."""
    projection = path.layers[str(hooks.index)].value_projection
    name = next(name for name, module in model.named_modules() if module is projection)
    attention = model.get_submodule(name.rpartition(".")[0])
    feedback, projected, of_others = [], [], []
    spy = AttentionSpy()

    def keep(path: FeedbackPath, args: tuple, td: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        feedback.append(td[hooks.index])
        return {hooks.index: td[hooks.index]}

    others = [part for part in attention.children() if isinstance(part, nn.Linear) and part is not projection]
    with (
        contextlib.ExitStack() as more,
        path.register_forward_hook(keep),
        projection.register_forward_hook(lambda module, args, output: projected.append((args[0], _first(output)))),
        spy.watching(attention),
    ):
        for part in others:
            more.enter_context(part.register_forward_pre_hook(lambda module, args: of_others.append((args[0],))))
        outputs_of(model, inputs)
    assert len(spy.calls) >= 2 and feedback, "attention did not run twice"
    assert feedback[0].abs().max() > 0.001, "there is no feedback"
    first, second = spy.calls[0], spy.calls[len(spy.calls) // 2]
    assert len(first) == len(second), "attention runs in another way"
    if not first:  # YOSO has no softmax
        first, second = of_others[: len(of_others) // 2], of_others[len(of_others) // 2 :]
    assert first, "no attention was seen"
    for before, after in zip(first, second, strict=True):
        parts = zip(before[:2], after[:2], strict=True)
        assert all(torch.allclose(*part, rtol=1e-4, atol=1e-5) for part in parts), "queries or keys change"
        if len(before) == 3:
            assert not torch.allclose(before[2], after[2], atol=1e-4), "the values stay"
    (h, before), (steered, after) = projected[0], projected[len(projected) // 2]
    if hooks.columns is None and hooks.arrange is None:
        torch.testing.assert_close(steered, h + feedback[0].reshape(h.shape), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-4), "the projection gives the same"


def _check_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    seed_all()
    outputs = [output.float() for output in _tensors(model(**inputs)) if output.requires_grad]
    weights = [torch.linspace(-1, 1, output.numel()).view_as(output) for output in outputs]
    losses = [(w * out).sum().tanh() + out.square().mean() for w, out in zip(weights, outputs, strict=True)]
    sum(losses).backward()
    without = [
        name for name, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ]
    model.zero_grad()
    assert not without, f"none for {without[0]} and {len(without) - 1} more"


def _check_training(model: nn.Module, inputs: dict[str, torch.Tensor], expected: Expected) -> bool:
    """Where the base model itself runs in training mode; a block without steering would get no gradients."""
    if expected.in_training is None:
        return False
    with in_training(model):
        found = outputs_of(model, inputs)
        for tensor, before in zip(found, expected.in_training, strict=True):
            assert tensor.isfinite().all() or not before.isfinite().all(), "the output is not finite"
        assert not all(map(torch.equal, found, expected.in_training)), "the adapter has no effect"
        _check_gradients(model, inputs)
    return True


def _check_fused(model: nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
    """Where there are blocks with attention, not stages. In MobileBERT the rounding of thousands goes into a tanh."""
    expected = outputs_of(model, inputs)
    try:
        model.fuse_feedback()
    except NotImplementedError:
        return False
    for found, unfused in zip(outputs_of(model, inputs), expected, strict=True):
        assert _close(found, unfused, 1e-2), "fused feedback gives something else"
    model.unfuse_feedback()
    return True


def _cached_and_not(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits of generation with and without a cache, if the model generates."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    # Some models write into their inputs.
    inputs = {name: value.clone() for name, value in inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"suppress_tokens": list(range(50, 99))}
    logits = []
    for use_cache in (True, False):
        seed(0)
        generated = model.generate(**inputs, **options, use_cache=use_cache)
        logits.append(torch.stack(generated.logits))
    return logits[0], logits[1]


def _check_cache(model: nn.Module, inputs: dict[str, torch.Tensor], expected: Expected) -> bool:
    """Where the base model itself generates the same with and without a cache."""
    of_base = expected.generated
    if of_base is None or not torch.allclose(*of_base, rtol=1e-3, atol=1e-4):
        return False
    cached, recomputed = _cached_and_not(model, inputs)
    assert not torch.allclose(recomputed, of_base[1], atol=1e-4), "generation is that of the base model"
    largest = recomputed.abs().max().item()
    torch.testing.assert_close(cached, recomputed, rtol=1e-3, atol=1e-4 * largest)
    return True


def _check_loading(model: nn.Module, inputs: dict[str, torch.Tensor], expected: Expected, base: nn.Module) -> None:
    found = outputs_of(model, inputs)
    assert not all(map(torch.equal, found, expected.outputs)), "the adapter has no effect"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder).eval()
    for again, tensor in zip(outputs_of(loaded, inputs), found, strict=True):
        assert _close(again, tensor, 1e-3), "the loaded adapter gives something else"


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


# --------------------------------------------------------------------------------------------- one process for each


def sweep(types: list[str]) -> Iterator[Row]:
    """Examine each model type in a process of its own, forked from one that has imported what they share."""
    for model_type in ("bert", "llava", "whisper"):
        examine(model_type)
    context = multiprocessing.get_context("fork")
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_examine_quietly, args=(model_type, sender))
        process.start()
        sender.close()
        try:
            yield receiver.recv()
        except EOFError:
            process.join()
            too_long = process.exitcode == -signal.SIGXCPU
            yield Row(
                model_type, "", *(("not tried", "takes too long") if too_long else ("wrong", "the process ended"))
            )
        process.join()


def _examine_quietly(model_type: str, sender: Connection) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")
    warnings.filterwarnings("ignore")
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CPU, (_TIME_LIMIT, _TIME_LIMIT + 10))  # at the second one it could not tell why
    sender.send(examine(model_type))


# ------------------------------------------------------------------------------------------------------- the page


_WHAT_THIS_IS = """All {all} model types of transformers {version} that an auto class makes a model of, each tried
with `TopDownConfig()` on a tiny random model. {right} are right: {by_row} of them by a row of ours that says where
their value projections are, the others by their structure. {refused} are refused by an error before anything is
changed, for which a model need not run. {wrong} go wrong, and {not_tried} are not tried, as no tiny model could be
made that runs here. Vision towers of timm are replaced by a small ResNet or ViT.

*start*: a new adapter changes nothing, in training mode neither. *values*: in each block, its feedback changes the
values of the attention, and not its queries and keys. *gradients*: they reach every trained part. *training*: with
dropout as well, and the outputs are finite and steered. *fused*: fused feedback gives the same. *cache*: generation
with a cache computes what it does without one (of types that do so themselves). *loading*: a saved adapter gives the
same on a new model."""


def page(rows: list[Row]) -> str:
    """What docs/models.md says."""
    of = {name: [row for row in rows if row.result == name] for name in ("right", "refused", "wrong", "not tried")}
    counts = {name.replace(" ", "_"): len(of_result) for name, of_result in of.items()}
    by_row = sum(row.found == "row" for row in of["right"])
    parts = [f"`{name}`" for name in sorted(CONFIG_MAPPING_NAMES) if not auto_mapping_of(name)]
    lines = ["# Models", "", "<!-- Made by `python -m tests.sweep_model_types > docs/models.md`. -->", ""]
    lines += [_WHAT_THIS_IS.format(all=len(rows), version=transformers.__version__, by_row=by_row, **counts)]
    for name, of_result in of.items():
        if of_result:
            lines += ["", f"## {name.capitalize()}", "", "| model type | found by | result | |", "|---|---|---|---|"]
            lines += [f"| `{row.model_type}` | {row.found} | {name} | {_shortened(row.why)} |" for row in of_result]
    lines += ["", "## Parts of other models", "", "These have no auto class of their own:", f"{', '.join(parts)}."]
    return "\n".join(lines)


def _shortened(why: str) -> str:
    """The first sentence, without the advice that follows it."""
    without_paths = re.sub(r" from '[^']*'", "", " ".join(why.split()))  # of this machine
    first = re.split(r"\. (?=[A-Z])| \| ", without_paths)[0].replace("|", "/")
    return first if len(first) <= 250 else first[:247] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="all if there are none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for row in sweep(args.model_types or model_types()):
        print(*(" ".join(part.split()) for part in row), sep="\t", file=sys.stderr, flush=True)
        rows.append(row)
    print(page(sorted(rows)))


if __name__ == "__main__":
    main()

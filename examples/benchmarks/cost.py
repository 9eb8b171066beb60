"""What fine-tuning methods cost next to the frozen base model and LoRA: time, operations and memory, side by side.

    python examples/benchmarks/cost.py --models vit-small llama-768
    python examples/benchmarks/cost.py --models llama-1b --device cuda --dtype bfloat16 --compile_model

The models are made from configs with random weights; what they compute does not matter here. Each method is measured
right after what it is compared with, the base model (forward and decoding) or LoRA (training step), and the table has
the medians of these ratios over the rounds, so that a noisy machine slows both alike. `toast-fused` is `toast` with
fused feedback, which is for inference; `toast-stored` is a training step of `toast` with stored features;
`toast-closed` is `toast` under a gate that is closed, with `skip_closed_rows`: an adapter that does not apply.
`lora-merged` is LoRA merged into the base model. `free` is an adapter of no cost, for which only the gradient of what
the first block gets is computed: the floor of a training step of whatever changes the first block.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from methods import METHODS, apply_method
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)

from toast_peft import store_features
from toast_peft.core.gate import Gate

Inputs = dict[str, Any]
FUSED, STORED, CLOSED, MERGED = "-fused", "-stored", "-closed", "-merged"
FREE = "free"
# What the cache is called, in newer versions of transformers and in older ones.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaForCausalLM.forward).parameters)


def _vit(size: int, heads: int) -> tuple[type[nn.Module], PreTrainedConfig]:
    shape = {"hidden_size": size, "num_attention_heads": heads, "intermediate_size": 4 * size}
    return ViTForImageClassification, ViTConfig(**shape)


def _llama(size: int, layers: int, heads: int, key_value_heads: int) -> tuple[type[nn.Module], PreTrainedConfig]:
    shape = {"hidden_size": size, "num_hidden_layers": layers, "intermediate_size": 8 * size // 3}
    groups = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    return LlamaForCausalLM, LlamaConfig(vocab_size=8192, **shape, **groups)


MODELS = {
    "vit-small": _vit(384, 6),
    "vit-base": _vit(768, 12),
    "gpt2-768": (GPT2LMHeadModel, GPT2Config(vocab_size=8192)),  # queries, keys and values in one projection
    "llama-256": _llama(256, layers=12, heads=4, key_value_heads=2),
    "llama-768": _llama(768, layers=12, heads=12, key_value_heads=4),
    "llama-1b": _llama(2048, layers=16, heads=32, key_value_heads=8),
    "llama-3b": _llama(3072, layers=28, heads=24, key_value_heads=8),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults, and the lines of a description as they are."""


@dataclass
class Arguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: ["vit-small"], metadata={"help": "The models' shapes.", "choices": list(MODELS)}
    )
    methods: list[str] = field(
        default_factory=lambda: ["toast", "toast-lite", "toast-lite-early", "toast-lite-late"],
        metadata={
            "help": f"Methods of `methods.py` besides LoRA; of TOAST also with {FUSED!r}, {STORED!r} or {CLOSED!r} at "
            f"the end, of LoRA with {MERGED!r}.",
            "choices": [name for name, method in METHODS.items() if method.config]
            + [name + suffix for name in METHODS if name.startswith("toast") for suffix in (FUSED, STORED, CLOSED)]
            + [name + MERGED for name in METHODS if name.startswith("lora")]
            + [FREE],
        },
    )
    device: str = field(default="cpu", metadata={"help": "Device to measure on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base model, for example bfloat16."})
    batch_size: int = field(default=4, metadata={"help": "Images or sentences at a time."})
    length: int = field(default=128, metadata={"help": "Tokens in a sentence."})
    rounds: int = field(default=7, metadata={"help": "How often each method is measured."})
    autocast: bool = field(
        default=False, metadata={"help": "Measure under torch.autocast to bfloat16, as a Trainer with bf16=True runs."}
    )
    compile_model: bool = field(default=False, metadata={"help": "Measure after torch.compile."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the tables."})


def make_model(arguments: Arguments, shape: str, method: str) -> nn.Module:
    """The base model, adapted with a method unless this is "base"."""
    torch.manual_seed(0)
    model_class, config = MODELS[shape]
    with torch.device(arguments.device):
        model = model_class(copy.deepcopy(config)).to(getattr(torch, arguments.dtype))
    model = model.requires_grad_(False)
    model = adapt(model, method)
    if arguments.compile_model:
        model.compile()
    return model


def adapt(model: nn.Module, method: str) -> nn.Module:
    """The model adapted with a method, fused, closed or merged if its name says so; itself for "base"."""
    if method == FREE:
        model.enable_input_require_grads()
        return model
    if method.endswith(CLOSED):
        return closed(model, method.removesuffix(CLOSED))
    if method != "base":
        model = apply_method(model, method.removesuffix(FUSED).removesuffix(STORED).removesuffix(MERGED))
    if method.endswith(FUSED):
        model.eval().fuse_feedback()
    return model.merge_and_unload() if method.endswith(MERGED) else model


def closed(model: nn.Module, method: str) -> PeftModel:
    """The model adapted with a method, under a gate that no input opens."""
    config = METHODS[method].config
    assert config is not None
    adapted = get_peft_model(model, config(gate="sequence", skip_closed_rows=True))
    for gate in (module for module in adapted.modules() if isinstance(module, Gate)):
        gate.threshold.fill_(2)  # which no cosine is above
    return adapted


def make_inputs(arguments: Arguments, shape: str) -> Inputs:
    """A random batch with labels."""
    model_class, config = MODELS[shape]
    size, device = (arguments.batch_size, arguments.length), arguments.device
    if model_class.main_input_name == "pixel_values":
        shape_of_images = (arguments.batch_size, 3, config.image_size, config.image_size)
        images = torch.randn(shape_of_images, device=device, dtype=getattr(torch, arguments.dtype))
        return {"pixel_values": images, "labels": torch.zeros(size[:1], dtype=torch.long, device=device)}
    ids = torch.randint(0, config.vocab_size, size, device=device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def with_stored_features(model: nn.Module, inputs: Inputs) -> Inputs:
    """The batch with what pass 1 makes of it, from files as in training."""
    tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    rows = [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        stored = store_features(model, rows, folder, batch_size=len(rows))
        batch = stored.collate([stored[index] for index in range(len(rows))])
        return inputs | {name: value.to(model.device, copy=True) for name, value in batch.items()}


def seconds(function: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def forward_time(model: nn.Module, inputs: Inputs, device: str) -> float:
    """Seconds for a forward in eval mode."""
    model.eval()
    return seconds(lambda: model(**inputs), device)


def training_time(model: nn.Module, inputs: Inputs, device: str) -> float:
    """Seconds for a forward and backward."""
    model.train()
    taken = seconds(lambda: model(**inputs).loss.backward(), device)
    model.zero_grad()
    return taken


@torch.no_grad()
def decoding_time(model: nn.Module, inputs: Inputs, device: str, steps: int = 8) -> float:
    """Seconds for `steps` tokens with a static cache, after the prompt."""
    ids = inputs["input_ids"]
    cache = StaticCache(config=model.eval().config, max_cache_len=ids.shape[1] + steps)
    next_ids = model(input_ids=ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(steps):
            model(input_ids=next_ids, **{CACHE: cache})

    return seconds(decode, device)


def activation_megabytes(model: nn.Module, inputs: Inputs) -> float:
    """What autograd keeps for the backward pass, without parameters."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would hold the node that saves it, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = model.train()(**inputs).loss
    del loss
    return sum(kept.values()) / 2**20


def training_step_cost(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Floating-point operations of a forward and backward, and megabytes that the forward keeps for the backward."""
    # PyTorch does not count the fused attention of CPUs. The optimizer is not counted, for any method.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(**inputs).loss.backward()
    model.zero_grad()
    return {
        "flops_per_step": counter.get_total_flops(),
        "activation_megabytes": activation_megabytes(model, inputs),
    }


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += not (func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def forward_operations(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Floating-point operations and kernels of a forward in eval mode."""
    model.eval()
    with Kernels() as kernels:
        model(**inputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return {"FLOPs": counter.get_total_flops(), "kernels": kernels.number}


def measure(arguments: Arguments, shape: str) -> pd.DataFrame:
    """All methods in rounds; the first round warms up and does not count.

    Args:
        arguments: those of the command line.
        shape: one of `MODELS`.

    Returns:
        One row for each method, of ratios (medians over the rounds) and megabytes.
    """
    models = {name: make_model(arguments, shape, name) for name in dict.fromkeys(["base", "lora", *arguments.methods])}
    inputs = {name: make_inputs(arguments, shape) for name in models}
    for name in models:
        if name.endswith(STORED):
            inputs[name] = with_stored_features(models[name], inputs[name])
    table = times(models, inputs, arguments)
    if not arguments.compile_model:
        both = [(name, model, inputs[name]) for name, model in models.items()]
        operations = pd.DataFrame({n: forward_operations(model, given) for n, model, given in both if runs_alone(n)}).T
        table[["FLOPs / base", "kernels / base"]] = operations / operations.loc["base"]
        megabytes = {name: activation_megabytes(model, given) for name, model, given in both if is_trained(name)}
        table["activations kept, MB"] = pd.Series(megabytes)
    return table


def is_trained(method: str) -> bool:
    """Whether there is a training step to measure."""
    return method != "base" and not method.endswith((FUSED, CLOSED, MERGED))


def runs_alone(method: str) -> bool:
    """Whether there is inference to measure."""
    return method != FREE and not method.endswith(STORED)


def times(models: dict[str, nn.Module], inputs: dict[str, Inputs], arguments: Arguments) -> pd.DataFrame:
    """Ratios of times, each of two calls one right after the other."""
    timers: dict[str, Callable] = {"forward / base": forward_time, "training step / lora": training_time}
    if "input_ids" in inputs["base"]:
        timers["decoding / base"] = decoding_time
    ratios = []
    for round_index in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for method, (name, timer) in itertools.product(models, timers.items()):
            if not (is_trained if timer is training_time else runs_alone)(method):
                continue
            both = (name.rpartition(" / ")[2], method)
            expected, found = (timer(models[one], inputs[one], arguments.device) for one in both)
            ratios.append((round_index, method, name, found / expected))
    frame = pd.DataFrame(ratios, columns=["round", "method", "what", "ratio"]).query("round > 0")
    return frame.groupby(["method", "what"])["ratio"].median().unstack().loc[list(models), list(timers)]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables.

    Args:
        arguments: as on the command line.
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    results = {}
    for shape in parsed.models:
        with torch.autocast(torch.device(parsed.device).type, torch.bfloat16, enabled=parsed.autocast):
            table = measure(parsed, shape)
        results[shape] = table.to_dict(orient="index")
        dtype = f"{parsed.dtype}, autocast" if parsed.autocast else parsed.dtype
        print(f"\n{shape}, {parsed.device}, {dtype}, median of {parsed.rounds} rounds\n")
        formats = ["", *(".0f" if column.endswith("MB") else ".2f" for column in table)]
        print(table.astype(object).where(table.notna(), None).to_markdown(floatfmt=formats, missingval="-"))
    if parsed.output_file:
        described = {"arguments": asdict(parsed), "torch": torch.__version__, "threads": torch.get_num_threads()}
        Path(parsed.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(parsed.output_file).write_text(json.dumps(described | {"models": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What fine-tuning methods cost next to the frozen base model and LoRA: time and memory, measured side by side.

    python examples/benchmarks/cost.py --model vit-small
    python examples/benchmarks/cost.py --model llama-1b --device cuda --dtype bfloat16 --compile_model

The models are made from configs with random weights; what they compute does not matter here. Every round measures each
method once, one after the other, and the table shows medians over the rounds of the ratio to the base model (forward
and decoding) or to LoRA (training step), so that a noisy machine slows all of them alike.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from methods import METHODS, apply_method
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)

Inputs = dict[str, Any]
MODELS = {
    "vit-small": (
        ViTForImageClassification,
        ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    ),
    "vit-base": (ViTForImageClassification, ViTConfig()),
    "llama-30m": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
        ),
    ),
    "llama-1b": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults, and the lines of a description as they are."""


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default="vit-small", metadata={"help": "The model's shape.", "choices": list(MODELS)})
    methods: list[str] = field(
        default_factory=lambda: ["toast", "toast-lite", "toast-lite-early", "toast-lite-late"],
        metadata={
            "help": "Methods of `methods.py`, besides the base model and LoRA.",
            "choices": [name for name, method in METHODS.items() if method.config],
        },
    )
    device: str = field(default="cpu", metadata={"help": "Device to measure on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base model, for example bfloat16."})
    batch_size: int = field(default=4, metadata={"help": "Images or sentences at a time."})
    length: int = field(default=128, metadata={"help": "Tokens in a sentence."})
    rounds: int = field(default=7, metadata={"help": "How often each method is measured."})
    compile_model: bool = field(default=False, metadata={"help": "Measure after torch.compile."})


def make_model(arguments: Arguments, method: str) -> nn.Module:
    """The base model, adapted with a method unless this is "base"."""
    torch.manual_seed(0)
    model_class, config = MODELS[arguments.model]
    model = model_class(config).to(arguments.device, getattr(torch, arguments.dtype)).requires_grad_(False)
    if method != "base":
        model = apply_method(model, method)
    if arguments.compile_model:
        model.compile()
    return model


def make_inputs(arguments: Arguments) -> Inputs:
    """A random batch with labels."""
    model_class, config = MODELS[arguments.model]
    shape, device = (arguments.batch_size, arguments.length), arguments.device
    if model_class.main_input_name == "pixel_values":
        size, dtype = config.image_size, getattr(torch, arguments.dtype)
        images = torch.randn(arguments.batch_size, 3, size, size, device=device, dtype=dtype)
        return {"pixel_values": images, "labels": torch.zeros(shape[:1], dtype=torch.long, device=device)}
    ids = torch.randint(0, config.vocab_size, shape, device=device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


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
    next_ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(steps):
            model(input_ids=next_ids, past_key_values=cache)

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


def measure(arguments: Arguments) -> pd.DataFrame:
    """All methods in rounds; the first round warms up and does not count.

    Returns:
        One row for each method, of ratios (medians over the rounds) and megabytes.
    """
    models = {name: make_model(arguments, name) for name in dict.fromkeys(["base", "lora", *arguments.methods])}
    inputs, device = make_inputs(arguments), arguments.device
    timers = {"forward": forward_time, "training step": training_time, "decoding": decoding_time}
    if "input_ids" not in inputs:
        del timers["decoding"]
    times = []
    for round_index in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for method, model in models.items():
            for name, timer in timers.items():
                if (method, name) != ("base", "training step"):
                    times.append((round_index, method, name, timer(model, inputs, device)))
    frame = pd.DataFrame(times, columns=["round", "method", "what", "seconds"]).query("round > 0")
    taken = frame.pivot(index="round", columns=["what", "method"], values="seconds")
    table = pd.DataFrame(index=list(models))
    for name in timers:
        reference = "lora" if name == "training step" else "base"
        table[f"{name} / {reference}"] = taken[name].div(taken[name][reference], axis=0).median()
    if not arguments.compile_model:
        megabytes = {name: activation_megabytes(model, inputs) for name, model in models.items() if name != "base"}
        table["activations kept, MB"] = pd.Series(megabytes)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table.

    Args:
        arguments: as on the command line.
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    table = measure(parsed)
    print(f"\n{parsed.model}, {parsed.device}, {parsed.dtype}, median of {parsed.rounds} rounds\n")
    formats = ["", *(".0f" if column.endswith("MB") else ".2f" for column in table)]
    print(table.astype(object).where(table.notna(), None).to_markdown(floatfmt=formats, missingval="-"))


if __name__ == "__main__":
    main()

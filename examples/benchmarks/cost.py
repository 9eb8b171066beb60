"""What TOAST costs next to the frozen base model and LoRA: time and memory, measured side by side in one run.

    python examples/benchmarks/cost.py --model vit-small
    python examples/benchmarks/cost.py --model llama-1b --device cuda --dtype bfloat16 --compile_model

The models are made from configs with random weights; what they compute does not matter here. Every round measures each
method once, one after the other, and the table shows medians over the rounds of the ratio to the base model (forward
and decoding) or to LoRA (training step), so that a noisy machine slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)

from toast_peft import TopDownConfig

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
METHODS: dict[str, Callable[[], PeftConfig | None]] = {
    "base": lambda: None,
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "TOAST": lambda: TopDownConfig(),
    "TOAST-Lite r=8": lambda: TopDownConfig(r=8),
    "TOAST-Lite early": lambda: TopDownConfig(r=8, feedback_from=0.5),
    "TOAST-Lite late": lambda: TopDownConfig(r=8, feedback_to=0.5),
}


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default="vit-small", metadata={"help": "The model's shape.", "choices": list(MODELS)})
    device: str = field(default="cpu", metadata={"help": "Device to measure on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base model, for example bfloat16."})
    batch_size: int = field(default=4, metadata={"help": "Images or sentences at a time."})
    length: int = field(default=128, metadata={"help": "Tokens in a sentence."})
    rounds: int = field(default=7, metadata={"help": "How often each method is measured."})
    compile_model: bool = field(default=False, metadata={"help": "Measure after torch.compile."})


@dataclass
class Method:
    """A model to be measured and what has been measured."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    forward: list[float] = field(default_factory=list)
    training_step: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    memory: float = 0.0


def make_inputs(arguments: Arguments, model: nn.Module) -> dict[str, torch.Tensor]:
    """A random batch with labels."""
    shape = (arguments.batch_size, arguments.length)
    if model.main_input_name == "pixel_values":
        size, dtype = model.config.image_size, getattr(torch, arguments.dtype)
        images = torch.randn(arguments.batch_size, 3, size, size, device=arguments.device, dtype=dtype)
        return {"pixel_values": images, "labels": torch.zeros(shape[:1], dtype=torch.long, device=arguments.device)}
    ids = torch.randint(0, model.config.vocab_size, shape, device=arguments.device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def make_method(arguments: Arguments, config: PeftConfig | None) -> Method:
    """The base model, adapted if there is a config."""
    torch.manual_seed(0)
    model_class, model_config = MODELS[arguments.model]
    model = model_class(model_config).to(arguments.device, getattr(torch, arguments.dtype))
    inputs = make_inputs(arguments, model)
    model = model.requires_grad_(False) if config is None else get_peft_model(model, config)
    if arguments.compile_model:
        model.compile()
    return Method(model, inputs)


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
def run_forward(method: Method) -> None:
    """A forward in eval mode."""
    method.model.eval()(**method.inputs)


def run_training_step(method: Method) -> None:
    """Forward and backward."""
    method.model.train()(**method.inputs).loss.backward()
    method.model.zero_grad()


@torch.no_grad()
def decoding_time(method: Method, device: str, steps: int = 8) -> float:
    """Seconds for `steps` tokens with a static cache, after the prompt."""
    model, ids = method.model.eval(), method.inputs["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
    next_ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(steps):
            model(input_ids=next_ids, past_key_values=cache)

    return seconds(decode, device)


def activation_memory(method: Method) -> float:
    """Megabytes that autograd keeps for the backward pass, without parameters."""
    own = {parameter.data_ptr() for parameter in method.model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would hold the node that saves it, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = method.model.train()(**method.inputs).loss
    del loss
    return sum(kept.values()) / 2**20


def measure(arguments: Arguments) -> dict[str, Method]:
    """All methods, in rounds; the first round warms up and does not count."""
    methods = {name: make_method(arguments, make_config()) for name, make_config in METHODS.items()}
    for round_index in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for name, method in methods.items():
            times = [(method.forward, seconds(lambda: run_forward(method), arguments.device))]  # noqa: B023
            if name != "base":
                times.append(
                    (method.training_step, seconds(lambda: run_training_step(method), arguments.device))  # noqa: B023
                )
            if "input_ids" in method.inputs:
                times.append((method.decoding, decoding_time(method, arguments.device)))
            if round_index > 0:
                for record, value in times:
                    record.append(value)
    for name, method in methods.items():
        method.memory = 0.0 if name == "base" or arguments.compile_model else activation_memory(method)
    return methods


def ratio(times: list[float], reference: list[float]) -> str:
    """Median over the rounds of the ratio to the reference."""
    if not times:
        return "-"
    return f"{statistics.median(t / r for t, r in zip(times, reference, strict=True)):.2f}"


def main() -> None:
    """Measure and print the table."""
    [arguments] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    methods = measure(arguments)
    base, lora = methods["base"], methods["LoRA r=8"]
    print(f"\n{arguments.model}, {arguments.device}, {arguments.dtype}, median of {arguments.rounds} rounds\n")
    print("| method | forward / base | decoding / base | training step / LoRA | activations kept, MB |")
    print("|---|---|---|---|---|")
    for name, method in methods.items():
        cells = (
            ratio(method.forward, base.forward),
            ratio(method.decoding, base.decoding),
            ratio(method.training_step, lora.training_step),
            f"{method.memory:.0f}" if method.memory else "-",
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

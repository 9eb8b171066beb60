"""What a generated token costs: the base model, LoRA and TOAST, one pass after the other or both side by side.

    python examples/benchmarks/decoding.py --model llama-256
    python examples/benchmarks/decoding.py --model llama-1b --device cuda --dtype bfloat16 --cache static
    python examples/benchmarks/decoding.py --model_name_or_path folder_of_a_model --adapter folder_of_an_adapter \
        --prompt_file prompts.txt

Each way generates the same number of tokens through `generate`, one sequence at a time, right after the base model;
the table has the medians of the ratios. `toast-drafted` is `custom_generate=draft_with_first_pass` with fused
feedback: it takes one forward of two rows for a token whose draft holds, and two for the others. A model made from a
config has a new adapter, so that all drafts hold, and what is measured is one such forward.

On a GPU transformers compiles a model whose cache is static.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cost import FUSED, MODELS, HelpFormatter, adapt
from cost import Arguments as CostArguments
from cost import make_model as make_model_of_shape
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from toast_peft.drafting import draft_with_first_pass

DRAFTED = "-drafted"


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(
        default="llama-256",
        metadata={"help": "The model's shape.", "choices": [name for name in MODELS if not name.startswith("vit")]},
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A real model instead of a shape."})
    adapter: str | None = field(default=None, metadata={"help": "A saved TOAST adapter of the real model."})
    prompt_file: str | None = field(default=None, metadata={"help": "Text file, one prompt in each line."})
    methods: list[str] = field(
        default_factory=lambda: ["lora", "lora-merged", "toast-lite", "toast-lite-fused", "toast-lite-drafted"],
        metadata={"help": "Methods of `methods.py`, also fused, merged or drafted; with --adapter only how it runs."},
    )
    device: str = field(default="cpu", metadata={"help": "Device to measure on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base model, for example bfloat16."})
    cache: str = field(default="dynamic", metadata={"help": "The key-value cache.", "choices": ["dynamic", "static"]})
    new_tokens: int = field(default=64, metadata={"help": "Tokens to generate for each prompt."})
    rounds: int = field(default=5, metadata={"help": "How often each method is measured; each time another prompt."})


def make_model(arguments: Arguments, method: str) -> nn.Module:
    """A model in eval mode, adapted with a method unless this is "base"."""
    method = method.replace(DRAFTED, FUSED)
    if arguments.model_name_or_path is None:
        options = CostArguments(device=arguments.device, dtype=arguments.dtype)
        return make_model_of_shape(options, arguments.model, method).eval()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype)
    model = model.to(arguments.device)
    if arguments.adapter is None or not method.startswith("toast"):
        return adapt(model, method).eval()
    model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    if method.endswith(FUSED):
        model.fuse_feedback()
    return model


def make_prompts(arguments: Arguments) -> list[torch.Tensor]:
    """Prompts of one row each. Shape of each: [1, n]"""
    if arguments.prompt_file is None:
        torch.manual_seed(0)
        return [torch.randint(3, 8192, (1, 32), device=arguments.device) for _ in range(arguments.rounds + 1)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    lines = Path(arguments.prompt_file).read_text(encoding="utf-8").splitlines()
    return [tokenizer(line, return_tensors="pt").input_ids.to(arguments.device) for line in lines if line.strip()]


def generate(model: nn.Module, prompt: torch.Tensor, method: str, arguments: Arguments) -> tuple[float, torch.Tensor]:
    """Seconds to generate after a prompt, and what was generated. Shape: [1, n + new tokens]"""
    options: dict[str, Any] = {"custom_generate": draft_with_first_pass} if method.endswith(DRAFTED) else {}
    if arguments.cache == "static":
        options["cache_implementation"] = "static"
    number = arguments.new_tokens
    options |= {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    sequences = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options).cpu()
    return time.perf_counter() - start, sequences


@torch.no_grad()
def drafts_that_hold(base: nn.Module, sequences: torch.Tensor, prompt: torch.Tensor) -> float:
    """Share of the generated tokens that the base model finds the most likely ones, given those before."""
    drafted = base(input_ids=sequences[:, :-1].to(prompt.device)).logits.argmax(dim=-1).cpu()
    return (drafted == sequences[:, 1:])[:, prompt.shape[1] :].float().mean().item()


def measure(arguments: Arguments) -> pd.DataFrame:
    """All methods with each prompt; the first prompt warms up and does not count.

    Args:
        arguments: those of the command line.

    Returns:
        One row for each method: ratio to the base model, milliseconds for a token, and the share of drafts that hold.
    """
    prompts, rows = make_prompts(arguments)[: arguments.rounds + 1], []
    base = make_model(arguments, "base")
    for method in tqdm(arguments.methods):
        model = make_model(arguments, method)
        for index, prompt in enumerate(prompts):
            expected, _ = generate(base, prompt, "base", arguments)
            found, sequences = generate(model, prompt, method, arguments)
            per_token = 1000 * found / arguments.new_tokens
            rows.append((index, method, found / expected, per_token, drafts_that_hold(base, sequences, prompt)))
    columns = ["a token / base", "ms for a token", "drafts that hold"]
    frame = pd.DataFrame(rows, columns=["round", "method", *columns]).query("round > 0")
    return frame.groupby("method", sort=False)[columns].median()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table.

    Args:
        arguments: as on the command line.
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    table = measure(parsed)
    name = parsed.model_name_or_path or parsed.model
    print(f"\n{name}, {parsed.device}, {parsed.dtype}, {parsed.cache} cache, median of {parsed.rounds} rounds\n")
    print(table.to_markdown(floatfmt=("", ".2f", ".2f", ".2f")))


if __name__ == "__main__":
    main()

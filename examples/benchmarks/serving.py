"""What it costs to serve several adapters: a mixed batch, next to the same rows through one of them.

    python examples/benchmarks/serving.py --model vit-small
    python examples/benchmarks/serving.py --model llama-768 --batch_size 8 --adapters 4

Each way is measured right after the same rows through one adapter, and the table has the medians of these ratios:

- `mixed batch`: `adapter_names` gives each row one of the adapters, in turn;
- `one after the other`: a batch for each adapter, with its rows alone;
- `all at once`: all adapters are active for all rows, and their feedback is summed.

The last column is one adapter next to the base model. LoRA is PEFT's own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from cost import MODELS, HelpFormatter, Inputs, forward_time, make_inputs, make_model, seconds
from cost import Arguments as CostArguments
from methods import METHODS
from peft import PeftModel
from tqdm import tqdm
from transformers import HfArgumentParser

WAYS = ("mixed batch", "one after the other", "all at once")


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default="vit-small", metadata={"help": "The model's shape.", "choices": list(MODELS)})
    methods: list[str] = field(
        default_factory=lambda: ["toast", "toast-lite", "lora"], metadata={"help": "Some of `methods.py`."}
    )
    adapters: int = field(default=4, metadata={"help": "How many."})
    batch_size: int = field(default=8, metadata={"help": "Rows of the batch."})
    length: int = field(default=128, metadata={"help": "Tokens of a sentence."})
    device: str = field(default="cpu", metadata={"help": "Device to measure on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base model, for example bfloat16."})
    rounds: int = field(default=7, metadata={"help": "How often each way is measured."})


class Served:
    """A model with several adapters of a method, and the ways to run a batch through them.

    Args:
        model: has the first adapter, "default".
        method: of `METHODS`.
        number: of adapters.
        inputs: of the whole batch.
    """

    def __init__(self, model: PeftModel, method: str, number: int, inputs: Inputs) -> None:
        config = METHODS[method].config
        assert config is not None
        self.model, self.inputs = model, inputs
        self.names = ["default", *(f"adapter_{index}" for index in range(1, number))]
        for name in self.names[1:]:
            model.add_adapter(name, config())
        self.num_rows = len(inputs["labels"])

    def one(self) -> Callable[[], None]:
        """All rows through the first adapter."""
        self.model.set_adapter("default")
        return lambda: self.model(**self.inputs)

    def way(self, name: str) -> Callable[[], None]:
        """One of `WAYS`."""
        if name == "all at once":
            self.model.base_model.set_adapter(self.names)
            return lambda: self.model(**self.inputs)
        if name == "one after the other":
            return self._one_after_the_other
        names = [self.names[row % len(self.names)] for row in range(self.num_rows)]
        return lambda: self.model(**self.inputs, adapter_names=names)

    def _one_after_the_other(self) -> None:
        for index, name in enumerate(self.names):
            self.model.set_adapter(name)
            rows = slice(index, None, len(self.names))
            self.model(**{key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in self.inputs.items()})


@torch.no_grad()
def ratio(served: Served, way: str, device: str) -> float:
    """Seconds of a way by those of one adapter, one right after the other."""
    expected = seconds(served.one(), device)
    return seconds(served.way(way), device) / expected


def measure(arguments: Arguments) -> pd.DataFrame:
    """All methods and ways in rounds; the first round warms up and does not count.

    Args:
        arguments: those of the command line.

    Returns:
        One row for each method, of ratios (medians over the rounds).
    """
    options = CostArguments(
        device=arguments.device, dtype=arguments.dtype, batch_size=arguments.batch_size, length=arguments.length
    )
    new_model = functools.partial(make_model, options, arguments.model)
    inputs, base = make_inputs(options, arguments.model), new_model("base")
    served = {name: Served(new_model(name).eval(), name, arguments.adapters, inputs) for name in arguments.methods}
    rows = []
    for index in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for method, of_method in served.items():
            rows += [(index, method, f"{way} / one", ratio(of_method, way, arguments.device)) for way in WAYS]
            of_method.one()
            of_base = forward_time(base, inputs, arguments.device)
            rows.append(
                (index, method, "one / base", forward_time(of_method.model, inputs, arguments.device) / of_base)
            )
    frame = pd.DataFrame(rows, columns=["round", "method", "what", "ratio"]).query("round > 0")
    columns = [*(f"{way} / one" for way in WAYS), "one / base"]
    return frame.groupby(["method", "what"])["ratio"].median().unstack().loc[arguments.methods, columns]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table.

    Args:
        arguments: as on the command line.
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    table = measure(parsed)
    rows = f"{parsed.batch_size} rows, {parsed.adapters} adapters, median of {parsed.rounds} rounds"
    print(f"\n{parsed.model}, {parsed.device}, {parsed.dtype}, {rows}\n")
    print(table.to_markdown(floatfmt=["", *[".2f"] * len(table.columns)]))


if __name__ == "__main__":
    main()

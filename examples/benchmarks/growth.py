"""How the cost of TOAST grows with the depth, the width and the length of the input of a model: one plot.

    python examples/benchmarks/growth.py --output_file docs/growth.svg

Floating-point operations of a forward in units of the base model's, counted on tensors that hold no numbers, so that
large models cost nothing. The model is a ViT.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
import torch
from cost import HelpFormatter, forward_operations
from matplotlib.figure import Figure
from peft import get_peft_model
from transformers import HfArgumentParser, ViTConfig, ViTModel

from toast_peft import TopDownConfig

METHODS = {
    "TOAST": {},
    "TOAST-Lite r=8": {"r": 8},
    "early or late, half of the blocks": {"feedback_from": 0.5},
}
USUAL = {"blocks": 12, "channels": 768, "tokens": 256}
GROWTH = {
    "blocks": [4, 8, 12, 24, 48, 96],
    "channels": [256, 512, 768, 1536, 3072, 6144],
    "tokens": [16, 64, 256, 1024, 4096, 16384],
}


@dataclass
class Arguments:
    """Where the plot goes."""

    output_file: str = field(default="outputs/growth.svg", metadata={"help": "SVG, PNG or PDF."})


def operations(blocks: int, channels: int, tokens: int, options: dict | None = None) -> int:
    """Floating-point operations of a forward with one input; of the base model if `options` is `None`."""
    image_size = 16 * math.isqrt(tokens)
    shape = {"hidden_size": channels, "intermediate_size": 4 * channels, "num_attention_heads": channels // 64}
    config = ViTConfig(num_hidden_layers=blocks, image_size=image_size, patch_size=16, **shape)
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False)
        if options is not None:
            model = get_peft_model(model, TopDownConfig(init_prompt="random", **options))
        return forward_operations(model, {"pixel_values": torch.zeros(1, 3, image_size, image_size)})["FLOPs"]


def rows() -> Iterator[dict[str, object]]:
    """One row for each point of the plot."""
    for what, values in GROWTH.items():
        for value in values:
            shape = USUAL | {what: value}
            base = operations(**shape)
            for method, options in METHODS.items():
                ratio = operations(**shape, options=options) / base
                yield {"what": what, "value": value, "method": method, "ratio": ratio}


def plot(points: pd.DataFrame) -> Figure:
    """One panel for each of depth, width and length."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = points.groupby("what", sort=False)
    for axes, (what, panel) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for method, line in panel.groupby("method", sort=False):
            axes.plot(line["value"], line["ratio"], marker="o", markersize=3, label=method)
        others = ", ".join(f"{value} {name}" for name, value in USUAL.items() if name != what)
        axes.set(xlabel=what, title=others, ylim=(1, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(GROWTH[what], GROWTH[what])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("operations of a forward / base model")
    figure.axes[0].legend(fontsize="small", loc="lower left")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Count, and save the plot.

    Args:
        arguments: as on the command line.
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    points = pd.DataFrame(rows())
    print(points.pivot(index=["what", "value"], columns="method", values="ratio").to_markdown(floatfmt=".2f"))
    plot(points).savefig(parsed.output_file)


if __name__ == "__main__":
    main()

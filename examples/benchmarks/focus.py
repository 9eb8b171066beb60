r"""Are maps of relevance right? Focus on mosaics, and deletion and insertion of patches.

    python examples/benchmarks/focus.py
    python examples/benchmarks/focus.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 128 \
        --dataset_name folder_with_a_train_and_a_test_split --output_dir mine

A ViT learns to classify images with each method. It then gets mosaics of 2 x 2 test images, two of a target class and
two drawn at random from all other classes. *Focus* (https://arxiv.org/abs/2109.15035) is the share of the positive
relevance that is on the two tiles of the target class; a map that says nothing has 50 %. The maps:

- mask: of TOAST, with the learned prompt
- mask, requested: with the centred prompt of the target class as `topdown_prompt` instead, as in `steering.py`
- change of attention: how much more the class token attends to a patch in pass 2 than in pass 1, in the last block
- rollout: attention rollout of the class token, with TOAST that of pass 2
- Grad-CAM: for the target class
- random: random numbers

Then, for TOAST-Lite, patches of test images are deleted, the most relevant first, or inserted into an empty image. The
table has the areas under the probability of the true class: of a good map that of deletion is low and that of
insertion high.

Without a model and data it needs no network: a small ViT and handwritten digits.
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from comparison import only_our_progress
from cost import HelpFormatter
from relevance import area, curve, feedback_maps, focus, grad_cam, rollout
from steering import ImageArguments, Images, Rows, Steering
from tables import curves_table, focus_table
from torch import nn
from transformers import HfArgumentParser

Maps = dict[str, torch.Tensor]
CURVES_OF = "toast-lite"
STEPS = 8


@dataclass
class Arguments(ImageArguments):
    """What to explain."""

    methods: list[str] = field(
        default_factory=lambda: ["linear", "lora-all-linear", "full", "toast", CURVES_OF],
        metadata={"help": "Methods of `methods.py` to train with."},
    )
    curves: int = field(default=50, metadata={"help": "Number of test images for deletion and insertion."})
    output_dir: str = field(default="outputs/focus", metadata={"help": "Folder for the tables."})


class Focus(Steering):
    """Trained classifiers, and what is measured of their maps of relevance.

    Args:
        arguments: those of the script.
    """

    def run(self) -> pd.DataFrame:
        """Train and measure with all seeds; one row for each seed, method and kind of map."""
        frames = []
        for seed, method in product(range(self.arguments.seeds), self.arguments.methods):
            frames.append(pd.DataFrame(self.measured(method, seed)))
            print(frames[-1].to_string(index=False), flush=True)
        return pd.concat(frames, ignore_index=True)

    def measured(self, method: str, seed: int) -> Rows:
        """Train with a method; one row for each kind of map."""
        model, head = self.new_model(method, seed)
        if method.startswith("toast"):
            self.class_prompts = self.class_prompts or self.prompts_of_classes(model)  # pass 1 is frozen
        model = self.fit(model, method, head, self.rows_of_images(), seed)
        common = {"seed": seed, "method": method, "accuracy": self.accuracy(model)}
        found = self.focus_of(model, method)
        if method == CURVES_OF:
            areas = self.areas(model, method)
            found = {name: columns | areas[name] for name, columns in found.items()}
        return [common | {"relevance": name} | columns for name, columns in found.items()]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Of all test images, in per cent."""
        batches = self.test.pixels.to(model.device).split(50)
        predicted = torch.cat([model(pixel_values=pixels, **self.options).logits.argmax(-1) for pixels in batches])
        return 100 * float((predicted.cpu() == self.test.labels).float().mean())

    def focus_of(self, model: nn.Module, method: str) -> dict[str, dict[str, float]]:
        """For each kind of map its focus in per cent, and on how many mosaics it has any; always the same mosaics."""
        scenes, is_target, targets = mosaics_of_a_target(self.test, self.arguments.mosaics, seed=0)
        maps = self.maps(model, method, scenes, targets)
        shares = {name: focus(relevance, is_target) for name, relevance in maps.items()}
        return {
            name: {"focus": 100 * float(share.nanmean()), "mosaics": int(share.isfinite().sum())}
            for name, share in shares.items()
        }

    def areas(self, model: nn.Module, method: str) -> dict[str, dict[str, float]]:
        """For each kind of map the areas under deletion and insertion in per cent, on some test images."""
        order = torch.randperm(len(self.test.labels), generator=torch.Generator().manual_seed(0))
        chosen = order[: self.arguments.curves]
        pixels, labels = self.test.pixels[chosen], self.test.labels[chosen]
        inputs = {"pixel_values": pixels.to(model.device)} | self.options
        return {
            name: {
                column: 100 * float(area(curve(model, inputs, labels, relevance, STEPS, inserted)).mean())
                for column, inserted in (("deletion", False), ("insertion", True))
            }
            for name, relevance in self.maps(model, method, pixels, labels).items()
        }

    def maps(self, model: nn.Module, method: str, pixels: torch.Tensor, classes: torch.Tensor) -> Maps:
        """All maps of images for given classes. Shape of each: [b, h, w]"""
        parts = [
            self.maps_of_batch(model, method, pixels[batch], classes[batch])
            for batch in torch.arange(len(pixels)).split(50)
        ]
        maps = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if method == CURVES_OF:
            maps["random"] = torch.rand(maps["Grad-CAM"].shape, generator=torch.Generator().manual_seed(0))
        return maps

    def maps_of_batch(self, model: nn.Module, method: str, pixels: torch.Tensor, classes: torch.Tensor) -> Maps:
        """The maps that there are of a model. Shape of each: [b, h, w]"""
        inputs = {"pixel_values": pixels.to(model.device)} | self.options
        maps = {"Grad-CAM": grad_cam(model, inputs, classes)}
        if not method.startswith("toast"):
            return maps | {"rollout": rollout(model, inputs)}
        request = {"topdown_prompt": self.class_prompts["class, centred"][classes]}
        requested = feedback_maps(model, inputs | request)["mask"]
        return maps | feedback_maps(model, inputs) | {"mask, requested": requested}


def mosaics_of_a_target(images: Images, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random mosaics of 2 x 2 images of half the size, two of a target class and two of any other classes.

    Returns:
        The mosaics, which tiles are of the target, and the targets. Shapes: [m, 3, height, width], [m, 4], [m]
    """
    generator = torch.Generator().manual_seed(seed)
    scenes, are_targets, targets = [], [], []
    for _ in range(number):
        target = torch.randint(images.num_classes, (1,), generator=generator)
        # One to `num_classes - 1` classes further on is any class but the target.
        others = (target + torch.randint(1, images.num_classes, (2,), generator=generator)) % images.num_classes
        order = torch.cat([target, target, others])[torch.randperm(4, generator=generator)]
        scenes.append(images.mosaic(order, generator))
        are_targets.append(order == target)
        targets.append(target)
    return torch.stack(scenes), torch.stack(are_targets), torch.cat(targets)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each seed, method and kind of map. The tables of their means are printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    folder = Path(parsed.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = Focus(parsed).run()
    runs.to_csv(folder / "runs.csv", index=False)
    tables = [focus_table(runs)] + ([curves_table(runs)] if CURVES_OF in parsed.methods else [])
    markdown = "\n\n".join(table.to_markdown(disable_numparse=True) for table in tables)
    (folder / "focus.md").write_text(markdown + "\n")
    print(f"\n{markdown}")
    return runs


if __name__ == "__main__":
    main()

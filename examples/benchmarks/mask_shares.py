r"""How much of TOAST's mask is on the objects of each class? On images with masks of their pixels.

    python examples/benchmarks/mask_shares.py
    python examples/benchmarks/mask_shares.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_file train.parquet --test_file test.parquet --unlabelled 255 --image_size 256 --output_dir mine

A segmentation model is trained with TOAST, as in `compare_segmentation.py`, with the usual learning rate. The table
has for each class its share of the pixels of all test images, and the share of the mask that is on them, divided by
that of the pixels: 1 is a mask that does not know the class, 2 one that is twice as high there as on average. The
masks:

- start: of the new adapter
- trained: of the trained one
- requested: with the centred prompt of the class as `topdown_prompt`, `prompt_from` the patches of training images of
  which it has more than half; a class without such patches has none

Without a model and data it needs no network: a small ViT that knows the digits 0 to 4 learns to segment images of 5
to 9.
"""

from dataclasses import dataclass, field
from itertools import product

import pandas as pd
import torch
from compare_segmentation import UNLABELLED, SegmentationArguments, SegmentationComparison
from comparison import Rows, make_optimizer, only_our_progress, parse
from methods import METHODS, apply_method
from relevance import on_patches, requested_masks
from steering import WEIGHT_DECAY
from tables import shares_table
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, set_seed

import toast_peft


@dataclass
class MaskSharesArguments(SegmentationArguments):
    """What to train, and on which images and masks."""

    class_names: list[str] | None = field(default=None, metadata={"help": "Names of the classes, for the table."})


class MaskShares(SegmentationComparison):
    """Where the masks of trained segmentation models are."""

    arguments: MaskSharesArguments

    def run(self) -> pd.DataFrame:
        """Train and measure with all seeds; one row for each method, seed and class."""
        names = self.arguments.class_names or [str(index) for index in range(self.num_classes)]
        frames: list[pd.DataFrame] = []
        requested = None
        for method, seed in product(self.arguments.methods, range(self.arguments.seeds)):
            set_seed(seed)
            model, options = self.load_model()
            model = apply_method(model, method, **options)
            columns = {"class": names, "pixels": self.shares_of_pixels(), "start": self.ratios(model)}
            requested = self.requested_ratios(model) if requested is None else requested  # pass 1 is frozen
            scores = self.fit(model, method, options["modules_to_save"], seed)
            columns |= {"trained": self.ratios(model), "requested": requested}
            frames.append(pd.DataFrame(columns).assign(method=method, seed=seed, **scores))
            print(frames[-1].to_string(index=False), flush=True)
        runs = pd.concat(frames)
        table = shares_table(runs).to_markdown(disable_numparse=True)
        runs.to_csv(self.folder / "runs.csv", index=False)
        (self.folder / "mask_shares.md").write_text(table + "\n")
        print(f"\n{table}")
        return runs

    def fit(self, model: nn.Module, method: str, new_modules: list[str], seed: int) -> dict[str, float]:
        """Train on all training data, and measure the segmentation on the test data."""
        optimizer = make_optimizer(model, METHODS[method].vision, WEIGHT_DECAY, new_modules)
        arguments = self.training_arguments(seed)
        trainer = Trainer(model, arguments, self.collate, self.rows["train"], optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return self.measure(trainer, "test")

    def shares_of_pixels(self) -> torch.Tensor:
        """Of each class, of all pixels of the test images that have one, in per cent. Shape: [c]"""
        labels = torch.stack([row["labels"] for row in self.rows["test"]])
        counts = torch.bincount(labels[labels != UNLABELLED], minlength=self.num_classes)
        return 100 * counts / counts.sum()

    def ratios(self, model: nn.Module) -> torch.Tensor:
        """Those of the table, of the mask with the prompt of the adapter. Shape: [c]"""
        masks, fractions = [], []
        for inputs, labels in self.batches(model, self.rows["test"]):
            masks.append(on_patches(torch.from_numpy(toast_peft.explain(model, inputs).mask), model, inputs))
            fractions.append(class_fractions(labels, masks[-1].shape[1:], self.num_classes))
        return enrichment(torch.cat(masks), torch.cat(fractions))

    def requested_ratios(self, model: nn.Module) -> torch.Tensor:
        """For each class that of the mask that is asked for it, NaN without a prompt. Shape: [c]"""
        prompts = self.prompts_of_classes(model)
        masks, fractions = [], []
        for inputs, labels in self.batches(model, self.rows["test"]):
            masks.append(requested_masks(model, inputs, prompts - prompts.nanmean(0)))
            fractions.append(class_fractions(labels, masks[-1].shape[1:3], self.num_classes))
        of_classes = torch.cat(masks).unbind(-1)
        return torch.stack([enrichment(mask, torch.cat(fractions))[i] for i, mask in enumerate(of_classes)])

    def prompts_of_classes(self, model: nn.Module) -> torch.Tensor:
        """Of the training images, NaN for a class that has no patch. Shape: [c, d]"""
        found: list[list[torch.Tensor]] = [[] for _ in range(self.num_classes)]
        for inputs, labels in self.batches(model, self.rows["train"]):
            patch = model.config.patch_size
            grid = [size // patch for size in labels.shape[1:]]
            is_of_class = class_fractions(labels, grid, self.num_classes).flatten(1, 2) > 0.5
            is_of_class = F.pad(is_of_class, (0, 0, 1, 0))  # the class token is of none
            for index, tokens in enumerate(is_of_class.unbind(-1)):
                has_class = tokens.any(1)
                if has_class.any():
                    pixels = inputs["pixel_values"][has_class.to(model.device)]
                    found[index].append(toast_peft.prompt_from(model, {"pixel_values": pixels}, tokens[has_class]))
        nothing = torch.full((1, model.config.hidden_size), torch.nan, device=model.device)
        return torch.stack([torch.cat(prompts or [nothing]).mean(0) for prompts in found])

    def batches(self, model: nn.Module, rows: Rows) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Inputs and labels. Shapes: [b, 3, height, width], [b, height, width]"""
        size = self.arguments.per_device_eval_batch_size
        collated = [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [({"pixel_values": batch["pixel_values"].to(model.device)}, batch["labels"]) for batch in collated]


def class_fractions(labels: torch.Tensor, grid: tuple[int, int], num_classes: int) -> torch.Tensor:
    """How much of each patch is of each class.

    Args:
        labels: class of each pixel. Shape: [b, height, width]
        grid: h and w.
        num_classes: c.

    Returns:
        They sum to 1 where all pixels have a class. Shape: [b, h, w, c]
    """
    is_of_class = F.one_hot(labels.masked_fill(labels == UNLABELLED, num_classes), num_classes + 1)[..., :-1]
    return F.adaptive_avg_pool2d(is_of_class.permute(0, 3, 1, 2).float(), tuple(grid)).permute(0, 2, 3, 1)


def enrichment(mask: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """The share of a mask that is on the pixels of a class, divided by the share of pixels that it has.

    Args:
        mask: constant over a patch. Shape: [b, h, w]
        fractions: how much of a patch is of a class. Shape: [b, h, w, c]

    Returns:
        NaN where there are no such pixels. Shape: [c]
    """
    on_class = (mask[..., None] * fractions).sum((0, 1, 2))
    pixels = fractions.sum((0, 1, 2))
    return (on_class / on_class.sum()) / (pixels / pixels.sum())


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line; `--tries` and `--validation_share` have no effect, nothing is searched.

    Returns:
        One row for each method, seed and class. The table of their means is printed and saved.
    """
    only_our_progress()
    defaults = {"output_dir": "outputs/mask_shares", "methods": ["toast-lite"]}
    return MaskShares(parse(MaskSharesArguments, "vision", __doc__, arguments, **defaults)).run()


if __name__ == "__main__":
    main()

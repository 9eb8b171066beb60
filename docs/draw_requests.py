"""Draws `docs/requests.png`: two requests on one photo, and the mask with each of them.

    python docs/draw_requests.py --model google/vit-base-patch16-224

Each request is the mean feature of a small box of the photo, minus the mean of both. Nothing is trained. The photo is
"flower" by vultilion, https://www.flickr.com/photos/vultilion/6056698931/, CC BY 2.0, as it comes with scikit-learn.
"""

import argparse
from pathlib import Path

import torch
from draw_flowers import CROP
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import get_peft_model
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import toast_peft

# left, top, right, bottom, as shares of the photo
BOXES = {"look for the flower": (0.3, 0.4, 0.45, 0.55), "look for what is behind it": (0.75, 0.05, 0.9, 0.2)}


def main() -> None:
    """Ask for each box, and draw what is selected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an image classifier, on the Hub or in a folder")
    parser.add_argument("--output", default=str(Path(__file__).parent / "requests.png"))
    arguments = parser.parse_args()
    processor = AutoImageProcessor.from_pretrained(arguments.model, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(arguments.model)
    model = get_peft_model(model, toast_peft.TopDownConfig(r=8)).eval()
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop(CROP)
    inputs = dict(processor(photo, return_tensors="pt"))
    size = inputs["pixel_values"].shape[-1]
    boxes = [[round(size * share) for share in box] for box in BOXES.values()]
    prompts = torch.cat([toast_peft.prompt_from(model, inputs, boxes=box) for box in boxes])
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for place, (name, box, prompt) in enumerate(zip(BOXES, boxes, prompts - prompts.mean(0), strict=True), start=1):
        with model.prompted(prompt):
            explanation = toast_peft.explain(model, inputs, processor)
        rows, columns = explanation.grid
        axes = figure.add_subplot(1, 2, place, title=name, xticks=[], yticks=[])
        axes.imshow(explanation.images[0].mean(-1), cmap="gray", extent=(0, size, size, 0))
        mask = explanation.mask[0, -rows * columns :].reshape(rows, columns)
        axes.imshow(mask, cmap="inferno", alpha=0.65, vmin=0, extent=(0, size, size, 0))
        left, top, right, bottom = box
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="cyan", linewidth=2))
    figure.savefig(arguments.output, dpi=90)


if __name__ == "__main__":
    main()

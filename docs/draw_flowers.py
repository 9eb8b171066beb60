"""Draws `docs/explain_flowers.png`: a ViT adapted to flowers, explained on a photo that it was not trained with.

    python docs/draw_flowers.py --model google/vit-base-patch16-224 --train_file flowers.parquet

The photo is "flower" by vultilion, https://www.flickr.com/photos/vultilion/6056698931/, CC BY 2.0, as it comes with
scikit-learn. Those to train with, columns `image` and `label`, are in no picture.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import toast_peft

CROP = (120, 0, 547, 427)  # left, top, right, bottom, in pixels of the photo


def parse() -> argparse.Namespace:
    """The arguments of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an image classifier, on the Hub or in a folder")
    parser.add_argument("--train_file", required=True, help="a Parquet file with the columns `image` and `label`")
    parser.add_argument("--output", default=str(Path(__file__).parent / "explain_flowers.png"))
    parser.add_argument("--images", type=int, default=400, help="how many to train with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser.parse_args()


def train(model: PeftModel, pixels: torch.Tensor, labels: torch.Tensor, epochs: int, learning_rate: float) -> None:
    """A few epochs of AdamW, after a start from the data. Shapes: [images, 3, height, width], [images]"""
    starts = range(0, min(128, len(pixels)), 32)
    toast_peft.initialize_feedback(model, [{"pixel_values": pixels[start : start + 32]} for start in starts])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(25):
            model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    """Adapt the model, and draw what it sees."""
    arguments = parse()
    set_seed(0)
    data: Dataset = load_dataset("parquet", data_files={"train": arguments.train_file})["train"]
    data = data.shuffle(seed=0).select(range(arguments.images))
    classes = dict(enumerate(data.features["label"].names))
    processor = AutoImageProcessor.from_pretrained(arguments.model, backend="pil")
    base = AutoModelForImageClassification.from_pretrained(
        arguments.model, id2label=classes, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, toast_peft.TopDownConfig(r=8, modules_to_save=["classifier"]))
    pixels = processor([image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
    train(model, pixels, torch.tensor(data["label"]), arguments.epochs, arguments.learning_rate)
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop(CROP)
    explanation = toast_peft.explain(model, processor(photo, return_tensors="pt"), processor)
    explanation.plot().savefig(arguments.output, dpi=90)


if __name__ == "__main__":
    main()

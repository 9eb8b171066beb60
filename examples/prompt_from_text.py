"""Steer a vision tower by words: the embedding of a text becomes the prompt of TOAST.

    python examples/prompt_from_text.py
    python examples/prompt_from_text.py --learning_rate 1e-2 --num_train_epochs 10 --output_dir outputs/mine

It needs no network. A small model with two towers, trained as CLIP is, learns captions such as "the red three and the
blue nine". Then it is frozen, and learns to answer a request such as "the three" with the colour of that digit, in
scenes of four: the text tower reads the request, a linear map turns its embedding into the `topdown_prompt` of the
vision tower, and TOAST-Lite and a new head learn what to do with it. The image does not say which digit is meant.

This is the form of AbSViT (https://arxiv.org/abs/2303.13043) in which language steers vision, in the small: ten digits
of 8 x 8 pixels and as many words. The training asks for eight of these; `eval_accuracy` is that of requests for
these in new scenes, `eval_accuracy_new_words` of those for the two others, which only the captions had.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from toast_peft import TopDownConfig

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
VOCABULARY = ["<pad>", "the", "and", *COLOURS, *DIGITS]
LENGTH = 7  # of a caption: "the red three and the blue nine"
KNOWN_WORDS, NEW_WORDS = list(range(8)), [8, 9]


@dataclass
class Arguments:
    """How much data there is, and how long the small SigLIP is trained."""

    scenes: int = field(default=8000, metadata={"help": "Number of scenes of the training."})
    pretraining_steps: int = field(default=1000, metadata={"help": "Steps of pre-training of the small SigLIP."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(output_dir="outputs/prompt_from_text", learning_rate=5e-3, num_train_epochs=5)
    trainer_parser.set_defaults(per_device_train_batch_size=64, per_device_eval_batch_size=256)
    trainer_parser.set_defaults(lr_scheduler_type="cosine", save_strategy="no")
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


class Scenes(torch.utils.data.Dataset):
    """Scenes of 2 x 2 coloured handwritten digits, 16 x 16 pixels: four different ones for a request, else one or two.

    Args:
        number: how many.
        for_training: made of the first 1200 images of scikit-learn's digits, or of the others.
        requests: the digits that are asked for; `None` to give captions instead.
    """

    def __init__(self, number: int, for_training: bool, requests: list[int] | None = None) -> None:
        generator = np.random.default_rng(0 if for_training else 1)
        images, targets = load_digits(return_X_y=True)
        part = slice(0, 1200) if for_training else slice(1200, None)
        images, targets = images[part].reshape(-1, 8, 8) / 16, targets[part]
        images_of = [images[targets == digit] for digit in range(10)]
        scenes, texts, self.labels = [], [], []
        for _ in range(number):
            shown, colours = generator.permutation(10)[:4], generator.integers(4, size=4)
            if requests is None:  # one digit or two, all of which the caption names
                order = generator.permutation([0, 0, 0, 0] if generator.random() < 0.5 else [0, 0, 1, 1])
                shown, colours, asked = shown[order], colours[order], None
                pairs = dict(zip(shown, colours, strict=True)).items()
                text = " and ".join(f"the {list(COLOURS)[colour]} {DIGITS[digit]}" for digit, colour in pairs)
            else:
                digit = generator.choice(requests)
                others = generator.permutation([other for other in range(10) if other != digit])[:3]
                shown, colours = generator.permutation([digit, *others]), generator.permutation(4)
                asked, text = list(shown).index(digit), f"the {DIGITS[digit]}"
            drawn = [generator.choice(images_of[digit]) for digit in shown]
            red_green_blue = np.array(list(COLOURS.values()))[colours]
            tiles = 2 * np.einsum("thw,tc->tchw", np.stack(drawn), red_green_blue) - 1
            scenes.append(np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]]))
            texts.append(token_ids(text))
            self.labels.append(None if asked is None else colours[asked])
        self.pixels, self.input_ids = torch.tensor(np.stack(scenes), dtype=torch.float32), torch.tensor(texts)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"pixel_values": self.pixels[index], "input_ids": self.input_ids[index]}
        return row if self.labels[index] is None else row | {"labels": self.labels[index]}


def token_ids(text: str) -> list[int]:
    """A token for each word, padded as SigLIP does it, without a mask."""
    ids = [VOCABULARY.index(word) for word in text.split()]
    return ids + [0] * (LENGTH - len(ids))


class Captioned(Trainer):
    """Trains a SigLIP on pairs of scenes and captions."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """That of CLIP: which scene belongs to a caption, and which caption to a scene?"""
        logits = model(**inputs).logits_per_image
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def pretrain(folder: Path, steps: int) -> None:
    """Train a small SigLIP and save it."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = size | {"vocab_size": len(VOCABULARY), "max_position_embeddings": LENGTH, "num_hidden_layers": 2}
    text |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 4}))
    nn.init.constant_(model.logit_scale, 2.7)  # as CLIP, for its loss
    schedule = {
        "max_steps": steps,
        "learning_rate": 2e-3,
        "logging_steps": 100,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
    }
    options = {"per_device_train_batch_size": 128, "weight_decay": 0.05, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **schedule, **options)
    Captioned(model, arguments, train_dataset=Scenes(20000 if steps > 100 else 200, for_training=True)).train()
    model.save_pretrained(folder)


class SteeredByText(nn.Module):
    """A vision tower that looks for what a text names.

    Args:
        folder: of a SigLIP.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.text = SiglipTextModel.from_pretrained(folder).requires_grad_(False)
        vision = SiglipForImageClassification.from_pretrained(folder, num_labels=len(COLOURS))
        # The prompt is given, so that none is learned.
        parts = ("transform", "linear1", "linear2")
        self.vision = get_peft_model(vision, TopDownConfig(r=8, trainable_parts=parts, modules_to_save=["classifier"]))
        self.to_prompt = nn.Linear(self.text.config.hidden_size, vision.config.vision_config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Of which colour is it? Shapes: [b, 3, 16, 16], [b, LENGTH], [b]"""
        embedding = self.text(input_ids=input_ids).pooler_output
        return self.vision(pixel_values=pixel_values, labels=labels, topdown_prompt=self.to_prompt(embedding))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of requests that are answered with the right colour. Shapes: [scenes, 4] and [scenes]"""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    folder = Path(training_arguments.output_dir)
    pretrain(folder / "small_siglip", arguments.pretraining_steps)
    model = SteeredByText(folder / "small_siglip")
    train = Scenes(arguments.scenes, for_training=True, requests=KNOWN_WORDS)
    test = {"": Scenes(1000, False, KNOWN_WORDS), "_new_words": Scenes(1000, False, NEW_WORDS)}
    trainer = Trainer(model, training_arguments, train_dataset=train, compute_metrics=accuracy)
    metrics = trainer.evaluate(test[""], metric_key_prefix="before")
    trainer.train()
    metrics |= trainer.evaluate(test[""])
    metrics["eval_accuracy_new_words"] = trainer.evaluate(test["_new_words"])["eval_accuracy"]
    model.vision.save_pretrained(folder)
    save_file(model.to_prompt.state_dict(), folder / "to_prompt.safetensors")
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()

"""Pre-tune the feedback path of TOAST on general data, for others to start from.

    python examples/pretune.py --modality images
    python examples/pretune.py --modality text --model_name_or_path meta-llama/Llama-3.2-1B \
        --dataset_name HuggingFaceFW/fineweb --max_steps 10000 --save_strategy steps --output_dir outputs/pretuned
    python examples/pretune.py ... --resume_from_checkpoint outputs/pretuned/checkpoint-5000

The variational loss teaches the feedback path to compute the input of each block from its output. On text it is added
to the loss of language modelling. On images it is added to the classification loss if there are labels; without labels
to self-distillation, by which the output with feedback stays that of the model without.

The data is streamed. What is saved is an ordinary adapter; start from it with
`TopDownConfig(pretrained_feedback="outputs/pretuned")`. Without a model and data set no network is needed: the small
models of the other examples are pre-tuned on what they were pre-trained on.
"""

from dataclasses import dataclass, field
from typing import Any

import image_classification
import language_modeling
import torch
from adaptation import BaseModelArguments
from datasets import IterableDataset, load_dataset
from offline_data import handwritten_digits, library_docstrings
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import TopDownConfig


@dataclass(kw_only=True)
class PretuneArguments(BaseModelArguments):
    """What to pre-tune, and on what."""

    modality: str = field(metadata={"help": "What the model reads.", "choices": ["images", "text"]})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a local folder. Default: offline data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the classes of the images. Default: without labels."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this size, and the model's position embeddings with them."},
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})
    variational_weight: float | None = field(
        default=None, metadata={"help": "Weight of the variational loss. Default: 0.1 for images, 0.01 for text."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Shuffle among so many rows of the stream."})


class PretuneTrainer(Trainer):
    """A Trainer that logs the variational loss, and distils the model into itself where there are no labels."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of the model, or of self-distillation, with the variational loss."""
        if "labels" in inputs:  # the model adds the variational loss itself
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        toast = self.accelerator.unwrap_model(model)
        with torch.no_grad(), toast.disable_adapter():
            target = toast(**inputs).logits.softmax(-1)
        outputs = model(**inputs)
        loss = F.kl_div(outputs.logits.log_softmax(-1), target, reduction="batchmean") + toast.variational_loss()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the variational loss of the last step."""
        last = self.accelerator.unwrap_model(self.model).last_variational_loss
        if "loss" in logs and last is not None:
            logs["variational_loss"] = last.item()
        super().log(logs, *args, **kwargs)


def parse(arguments: list[str] | None = None) -> tuple[PretuneArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((PretuneArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="outputs/pretuned",
        max_steps=300,
        learning_rate=1e-3,
        save_strategy="no",
        logging_steps=20,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return parser.parse_args_into_dataclasses(arguments)


def stream(arguments: PretuneArguments, seed: int) -> IterableDataset:
    """The rows of the data, shuffled."""
    if arguments.dataset_name is not None:
        name, config, split = arguments.dataset_name, arguments.dataset_config_name, arguments.dataset_split
        data = load_dataset(name, config, split=split, streaming=True)
    elif arguments.modality == "images":
        data = handwritten_digits(range(5), examples_per_class=150)["train"].to_iterable_dataset()
    else:
        data = library_docstrings(numeric=False)["train"].to_iterable_dataset()
    return data.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer)


def images(arguments: PretuneArguments, seed: int, base: str) -> tuple[nn.Module, IterableDataset, TopDownConfig]:
    """A classifier, pixel values with labels if there are any, and what is trained."""
    processor = image_classification.make_processor(base, arguments.image_size)
    data, label = stream(arguments, seed), arguments.label_column_name
    options = {} if label is None else {"num_labels": data.features[label].num_classes}
    model = AutoModelForImageClassification.from_pretrained(base, ignore_mismatched_sizes=True, **options)
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        converted = [image.convert("RGB") for image in rows[arguments.image_column_name]]
        pixel_values = processor(converted, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixel_values)} | ({} if label is None else {"labels": rows[label]})

    data = data.map(transform, batched=True, batch_size=64, remove_columns=data.column_names)
    options = {"modules_to_save": None if label is None else head}
    return model, data, TopDownConfig.official_stage("vit-pretuning", **options)


def text(arguments: PretuneArguments, seed: int, base: str) -> tuple[nn.Module, IterableDataset, TopDownConfig]:
    """A language model, blocks of tokens, and what is trained."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = stream(arguments, seed).select_columns(arguments.text_column_name)
    data = data if arguments.text_column_name == "text" else data.rename_column(arguments.text_column_name, "text")
    blocks = language_modeling.blocks_of_tokens(tokenizer, arguments.block_size)
    data = data.map(blocks, batched=True, remove_columns="text")
    config = TopDownConfig.official_stage("llama-pretuning", task_type="CAUSAL_LM")
    return AutoModelForCausalLM.from_pretrained(base), data, config


def base_model_name(arguments: PretuneArguments, output_dir: str) -> str:
    """The name of the model to pre-tune; if none is given the small one of the other examples."""
    if arguments.modality == "images":
        return image_classification.base_model_name(arguments, output_dir)
    return language_modeling.base_model_name(arguments, output_dir, arguments.block_size)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The metrics of the Trainer.
    """
    pretune_arguments, training_arguments = parse(arguments)
    set_seed(training_arguments.seed)
    base = base_model_name(pretune_arguments, training_arguments.output_dir)
    prepare = images if pretune_arguments.modality == "images" else text
    model, data, config = prepare(pretune_arguments, training_arguments.seed, base)
    if pretune_arguments.variational_weight is not None:
        config.variational_weight = pretune_arguments.variational_weight
    positions = image_classification.position_arguments(pretune_arguments.image_size)
    trainer = PretuneTrainer(
        get_peft_model(model, config),
        training_arguments,
        train_dataset=data,
        data_collator=lambda rows: default_data_collator(rows) | positions,
    )
    metrics = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint).metrics
    trainer.save_model()
    return metrics


if __name__ == "__main__":
    print(main())

"""Pre-train the feedback of TOAST on general data, then adapt to a task from there.

    python examples/pretraining_feedback.py
    python examples/pretraining_feedback.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --dataset_name HuggingFaceFW/fineweb --max_steps 10000 --save_strategy steps --train_file task.txt
    python examples/pretraining_feedback.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name folder_of_images --image_column_name image --max_steps 10000

The variational loss teaches the feedback path to compute the input of each block from its output; the model adds it to
the loss of language modelling, or of the classification of images. What is saved is an ordinary adapter.

Without a model and data it needs no network: the feedback of a small LLaMA that has read docstrings of Python's
library is pre-trained on the same texts, and then adapted to docstrings of modules about numbers.
"""

import ast
import math
import sysconfig
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from peft import get_peft_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback

NUMERIC_MODULES = ["_pydecimal.py", "fractions.py", "statistics.py"]


@dataclass
class Arguments:
    """Which model, what to pre-train its feedback on, and the task."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the Hub or a local folder. Default: a small LLaMA, pre-trained first."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "General data, on the Hub or in a local folder, streamed. Default: docstrings."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Texts of the task. Default: docstrings or none."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column with images, in place of texts."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes of the images."})
    image_size: int | None = field(default=None, metadata={"help": "Resize the images to this size."})
    task_steps: int = field(default=150, metadata={"help": "Steps of training on the task, with texts."})
    pretraining_steps: int = field(default=350, metadata={"help": "Steps of pre-training of the small LLaMA."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --max_steps."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/pretraining_feedback",
        max_steps=200,
        learning_rate=1e-3,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def library_docstrings(numeric: bool) -> Dataset:
    """Docstrings of Python's standard library, of the `NUMERIC_MODULES` or of the others."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trees = [ast.parse(path.read_bytes()) for path in paths if (path.name in NUMERIC_MODULES) == numeric]
    found = [ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, documented)]
    return Dataset.from_dict({"text": list(dict.fromkeys(filter(None, found)))})


def blocks_of_tokens(
    data: Dataset | IterableDataset, base: str, column: str, block_size: int
) -> Dataset | IterableDataset:
    """Texts as tokens, joined and cut into blocks; what is left at the end is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = tokenizer(rows[column], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable([*text, tokenizer.eos_token_id] for text in texts))
        cut = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": cut, "labels": cut}

    return data.select_columns(column).map(blocks, batched=True, remove_columns=column)


def pixel_values(data: IterableDataset, base: str, arguments: Arguments) -> IterableDataset:
    """Images as the model takes them, with their labels."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    options = {"size": size, "crop_size": size} if arguments.image_size else {}
    processor = AutoImageProcessor.from_pretrained(base, backend="pil", **options)

    def pixels(rows: dict[str, list]) -> dict[str, list]:
        images = [image.convert("RGB") for image in rows[arguments.image_column_name]]
        values = list(processor(images, return_tensors="pt")["pixel_values"])
        return {"pixel_values": values, "labels": rows[arguments.label_column_name]}

    return data.map(pixels, batched=True, batch_size=64, remove_columns=data.column_names)


def pretrain_llama(folder: str, arguments: Arguments) -> None:
    """Pre-train a small LLaMA on docstrings of modules that are not about numbers, and save it."""
    bytes_and_end = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(vocab={token: index for index, token in enumerate(bytes_and_end)}, merges=[])
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    schedule = {"max_steps": arguments.pretraining_steps, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    data = blocks_of_tokens(library_docstrings(numeric=False), folder, "text", arguments.block_size)
    options = TrainingArguments(folder, learning_rate=3e-3, save_strategy="no", **schedule)
    Trainer(model, options, default_data_collator, data).train()
    model.save_pretrained(folder)


def prepare(base: str, data: IterableDataset, arguments: Arguments) -> tuple[PreTrainedModel, IterableDataset]:
    """The model with the feedback to pre-train, and its inputs."""
    if arguments.image_column_name is None:
        config = TopDownConfig.official_stage("llama-pretuning", task_type="CAUSAL_LM")
        data = blocks_of_tokens(data, base, arguments.text_column_name, arguments.block_size)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), data
    options = {"num_labels": data.features[arguments.label_column_name].num_classes, "ignore_mismatched_sizes": True}
    model = AutoModelForImageClassification.from_pretrained(base, **options)
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    config = TopDownConfig.official_stage("vit-pretuning", modules_to_save=head)
    return get_peft_model(model, config), pixel_values(data, base, arguments)


def adapt(base: str, pretrained: str, arguments: Arguments) -> dict[str, float]:
    """Adapt to the texts of a task from the pre-trained feedback, and save that as well.

    `initialize_feedback` would replace the pre-trained prompt. Returns the perplexity before and after.
    """
    texts = load_dataset("text", data_files=arguments.train_file)["train"] if arguments.train_file else None
    data = blocks_of_tokens(texts or library_docstrings(numeric=True), base, "text", arguments.block_size)
    data = data.train_test_split(0.2, seed=0)
    config = TopDownConfig(task_type="CAUSAL_LM", r=8, pretrained_feedback=pretrained)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    options = TrainingArguments(f"{pretrained}/task", learning_rate=3e-3, max_steps=arguments.task_steps)
    trainer = Trainer(model, options, default_data_collator, data["train"], data["test"])
    trainer.add_callback(FeedbackCallback(trainer))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    return {"before_perplexity": math.exp(before), "eval_perplexity": math.exp(trainer.evaluate()["eval_loss"])}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    output, base = training_arguments.output_dir, arguments.model_name_or_path
    if base is None:
        base = f"{output}/small_llama"
        pretrain_llama(base, arguments)
    if arguments.dataset_name is None:
        data = library_docstrings(numeric=False).to_iterable_dataset()
    else:
        data = load_dataset(arguments.dataset_name, split="train", streaming=True)
    model, data = prepare(base, data.shuffle(training_arguments.seed, buffer_size=1000), arguments)
    # What a ViT needs for images of another size than it was trained with.
    extra = {"interpolate_pos_encoding": True} if arguments.image_size else {}
    trainer = Trainer(model, training_arguments, lambda rows: default_data_collator(rows) | extra, data)
    trainer.add_callback(FeedbackCallback(trainer))  # logs the variational loss as well
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    metrics = {"variational_loss": trainer.model.last_variational_loss.item()}
    if arguments.train_file or arguments.dataset_name is None:
        metrics |= adapt(base, output, arguments)
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()

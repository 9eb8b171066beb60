"""Adapt a causal language model with TOAST, or for comparison with LoRA or full fine-tuning.

    python examples/language_modeling.py --method toast
    python examples/language_modeling.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --train_file mine.txt --validation_file held_out.txt --block_size 512 --output_dir outputs/mine

Without a model and data set it needs no network: a small byte-level LLaMA that has read docstrings of Python's
standard library learns those of its modules about numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from adaptation import (
    BaseModelArguments,
    DataArguments,
    ModelArguments,
    adapt,
    named_data,
    shortened,
    train_and_evaluate,
)
from datasets import DatasetDict
from offline_data import library_docstrings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# For the small LLaMA on the docstrings: for each method the best of 1e-3, 3e-3, 1e-2 and 3e-2 with another seed, but
# for TOAST-Lite 3e-3, nearly as good as 1e-2. At high rates the prompt of TOAST can turn away from all tokens; then
# there is no feedback and nothing left that learns.
LEARNING_RATES = {"lora": 3e-2, "toast": 3e-3, "toast_lite": 3e-3, "full": 1e-3}


@dataclass
class TextArguments(DataArguments):
    """Which texts to adapt to."""

    text_column_name: str = field(default="text", metadata={"help": "Column of the data set with the texts."})
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, TextArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((ModelArguments, TextArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="outputs/text/toast",
        do_train=True,
        do_eval=True,
        learning_rate=None,
        num_train_epochs=3,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        prediction_loss_only=True,
        label_names=["labels"],
    )
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(arguments)
    if model_arguments.method not in LEARNING_RATES:
        parser.error(f"--method {model_arguments.method} is not for text; choose one of {', '.join(LEARNING_RATES)}.")
    if training_arguments.learning_rate is None:
        training_arguments.learning_rate = LEARNING_RATES[model_arguments.method]
    return model_arguments, data_arguments, training_arguments


def load_texts(arguments: TextArguments) -> DatasetDict:
    """The data to adapt to, with the column "text"."""
    data = named_data(arguments)
    if data is None:
        return shortened(library_docstrings(numeric=True), arguments)
    data = data.select_columns(arguments.text_column_name)
    if arguments.text_column_name != "text":
        data = data.rename_column(arguments.text_column_name, "text")
    return shortened(data, arguments)


def blocks_of_tokens(tokenizer: PreTrainedTokenizerBase, block_size: int) -> Callable[[dict], dict]:
    """A function that tokenizes texts, joins them and cuts them into blocks; what is left at the end is dropped."""

    def blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = tokenizer(rows["text"])["input_ids"]
        # Not every tokenizer marks where a text starts or ends.
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        ends = [tokenizer.eos_token_id] if marks.isdisjoint(texts[0][:1] + texts[0][-1:]) else []
        tokens = list(chain.from_iterable(text + ends for text in texts))
        cut = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    return blocks


def preprocess(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> DatasetDict:
    """The texts as blocks of tokens."""
    blocks = blocks_of_tokens(tokenizer, block_size)
    return data.map(blocks, batched=True, remove_columns="text", desc="Tokenizing")


def make_trainer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, arguments: TrainingArguments
) -> Trainer:
    """A Trainer of a language model."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, an end of text and padding."""
    special = ["<|endoftext|>", "<|padding|>"]
    bytes_and_special = sorted(ByteLevel.alphabet()) + special
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(bytes_and_special)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


def pretrain(folder: Path, steps: int, block_size: int) -> None:
    """Pre-train a small LLaMA on docstrings of modules that are not about numbers, and save it."""
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=3e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    data = preprocess(library_docstrings(numeric=False), tokenizer, block_size)
    make_trainer(model, tokenizer, data, arguments).train()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def base_model_name(arguments: BaseModelArguments, output_dir: str, block_size: int) -> str:
    """The name of the model to adapt; if none is given the small LLaMA, which is pre-trained at first use."""
    if arguments.model_name_or_path is not None:
        return arguments.model_name_or_path
    folder = Path(output_dir).parent / "small_llama"
    if not (folder / "model.safetensors").exists():
        pretrain(folder, arguments.pretraining_steps, block_size)
    return str(folder)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The metrics: `before_perplexity`, `eval_perplexity`, `trainable_parameters` and those of the Trainer.
    """
    model_arguments, data_arguments, training_arguments = parse(arguments)
    set_seed(training_arguments.seed)
    base = base_model_name(model_arguments, training_arguments.output_dir, data_arguments.block_size)
    set_seed(training_arguments.seed)  # the same start whether or not the base model was pre-trained just now
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapt(model, model_arguments, trainable=training_arguments.do_train, task_type="CAUSAL_LM")
    data = preprocess(load_texts(data_arguments), tokenizer, data_arguments.block_size)
    metrics = train_and_evaluate(make_trainer(model, tokenizer, data, training_arguments))
    losses = {name: value for name, value in metrics.items() if name in ("before_loss", "eval_loss")}
    return metrics | {name.replace("loss", "perplexity"): math.exp(value) for name, value in losses.items()}


if __name__ == "__main__":
    print(main())

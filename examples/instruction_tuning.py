"""Tune a language model on instructions with TOAST and TRL.

    python examples/instruction_tuning.py
    python examples/instruction_tuning.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --train_file train.jsonl --validation_file test.jsonl --max_length 512 --output_dir outputs/mine

The data has conversations as TRL takes them ("messages", or "prompt" and "completion"), or the columns "instruction",
"input" and "output". Without a model and data it needs no network: a small LLaMA that has read docstrings of Python's
standard library is tuned to answer what a function does; so small, it learns what shows in the loss, not in answers.
"""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import PeftModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback

# For base models, which have none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass
class Arguments:
    """Which model to tune, and on which instructions."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the Hub or a local folder. Default: a small LLaMA, pre-trained first."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub or a local folder. Default: functions of Python's library."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Local .jsonl, .csv or .parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file for the evaluation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many conversations at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many at most."})
    pretraining_steps: int = field(default=350, metadata={"help": "Steps of pre-training of the small LLaMA."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, SFTConfig]:
    """The arguments of the script. `--help` shows our own; those of the trainer are over a hundred."""
    more = "All options of trl.SFTConfig work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(SFTConfig)
    trainer_parser.set_defaults(
        output_dir="outputs/instruction_tuning",
        learning_rate=3e-3,
        num_train_epochs=1,
        max_length=128,
        logging_steps=50,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=is_torch_bf16_gpu_available(),
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def load_conversations(arguments: Arguments) -> DatasetDict:
    """The splits "train" and "validation" as TRL takes them."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        suffix = Path(arguments.train_file.removesuffix(".gz")).suffix[1:]
        files = {split: name for split, name in files.items() if name}
        data = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=files)
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name)
    else:
        data = Dataset.from_list(list(documented_functions())).train_test_split(0.1, seed=0)
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    data = DatasetDict({split: data[split].select(range(len(data[split]))[:limit]) for split, limit in limits.items()})
    if "instruction" in data["train"].column_names:
        data = data.map(conversation, remove_columns=data["train"].column_names)
    return data


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """An instruction and its answer as a conversation."""
    question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}
    return {"prompt": [prompt], "completion": [completion]}


def documented_functions() -> Iterator[dict[str, str]]:
    """What the public functions in Python's standard library do, by the first paragraph of their docstrings."""
    known = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            is_public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if is_public and (text := ast.get_docstring(node)) and text not in known:
                known.add(text)
                question = f"What does {path.stem}.{node.name}({ast.unparse(node.args)}) do?"
                yield {"instruction": question, "output": " ".join(text.split("\n\n")[0].split())}


def pretrain(folder: str, steps: int) -> None:
    """Pre-train a small LLaMA on docstrings as they are, and save it."""
    bytes_and_end = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(vocab={token: index for index, token in enumerate(bytes_and_end)}, merges=[])
    size = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    schedule = {"max_steps": steps, "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    packing = {"packing": True, "packing_strategy": "wrapped", "max_length": 128}
    options = {"save_strategy": "no", "gradient_checkpointing": False, "bf16": is_torch_bf16_gpu_available()}
    texts = Dataset.from_dict({"text": [row["output"] for row in documented_functions()]})
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(folder, **schedule, **packing, **options),
        train_dataset=texts,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """What the model answers to some messages, the last of which is the user's."""
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **options).to(model.device)
    with torch.no_grad():
        [tokens] = model.eval().generate(**inputs, max_new_tokens=100, do_sample=False)
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def show(model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, list[dict[str, str]]]) -> None:
    """Print a question of a conversation with the answers of the base model, of the tuned one, and of the data."""
    messages = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    with model.disable_adapter():
        before = answer(model, tokenizer, messages[:first])
    after = answer(model, tokenizer, messages[:first])
    print(f"Question:  {messages[first - 1]['content']}\nBefore:    {before}")
    print(f"After:     {after}\nReference: {messages[first]['content']}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, config = parse(argv)
    set_seed(config.seed)
    base = arguments.model_name_or_path
    if base is None:
        base = f"{config.output_dir}/small_llama"
        pretrain(base, arguments.pretraining_steps)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    data = load_conversations(arguments)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=config,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        peft_config=TopDownConfig(task_type="CAUSAL_LM", r=8),
    )
    trainer.model.print_trainable_parameters()
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(trainer.model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    trainer.save_model()  # model.save_pretrained(...) with the tokenizer, also in distributed training
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    show(trainer.model, tokenizer, data["validation"][0])
    print(f"Loss on held-out answers: {metrics['before_loss']:.3f} before, {metrics['eval_loss']:.3f} after.")
    if arguments.model_name_or_path is None:
        print("So small a model gives no useful answers; for these, name a real one by --model_name_or_path.")
    return metrics


if __name__ == "__main__":
    main()

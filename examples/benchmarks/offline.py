"""Data and small base models that can be made on any machine without a network: the defaults of the comparisons."""

import ast
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ByT5Tokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)

Rows = list[dict[str, Any]]
LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "email", "importlib", "logging", "unittest")
# Their docstrings are worked examples with numbers, quite unlike the prose of the other modules.
NUMERIC_MODULES = ("_pydecimal", "fractions", "statistics")


def digits(classes: Sequence[int], examples_per_class: int) -> DatasetDict:
    """Handwritten digits of 8 x 8 pixels from scikit-learn: the splits "train", with so many examples, and "test"."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, classes)
    columns = {
        "image": [fromarray(image) for image in (pixels[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)],
        "label": np.searchsorted(classes, labels[chosen]),
    }
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in classes])})
    data = Dataset.from_dict(columns, features)
    return data.train_test_split(train_size=examples_per_class * len(classes), stratify_by_column="label", seed=0)


def digit_scenes(classes: Sequence[int], scenes: int) -> DatasetDict:
    """Images of four handwritten digits each, 16 x 16 pixels, and masks: which pixel is in the stroke of which digit.

    Returns:
        The splits "train" and "test", each of so many scenes, made of different digits, with the columns "image" and
        "mask". In the masks 0 is what is in no stroke.
    """
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "mask": Image()})
    splits = DatasetDict()
    for name, data in digits(classes, examples_per_class=60).items():
        images = np.stack([np.asarray(image) for image in data["image"]])
        masks = (images > 127) * (np.asarray(data["label"], dtype=np.uint8) + 1)[:, None, None]
        chosen = generator.integers(len(images), size=(scenes, 2, 2))
        columns = {
            column: [fromarray(scene) for scene in parts[chosen].swapaxes(2, 3).reshape(-1, 16, 16)]
            for column, parts in (("image", images), ("mask", masks))
        }
        splits[name] = Dataset.from_dict(columns, features)
    return splits


@cache
def docstrings(numeric: bool) -> DatasetDict:
    """Docstrings of Python's standard library, those of `NUMERIC_MODULES` or those of its other modules.

    Returns:
        The splits "train" and "test" with the column "text".
    """
    files = [file for file in sorted(LIBRARY.glob("*.py")) if (file.stem in NUMERIC_MODULES) == numeric]
    # Many classes share a docstring, which must not be in both splits.
    texts = dict.fromkeys(chain.from_iterable(map(docstrings_in, files)))
    return Dataset.from_dict({"text": list(texts)}).train_test_split(0.2, seed=0)


def package_docstrings(train: int, test: int) -> DatasetDict:
    """Docstrings of `PACKAGES`, labelled with their package: the splits "train" and "test", so many in each."""
    data = labelled_docstrings({name: sorted((LIBRARY / name).glob("*.py")) for name in PACKAGES})
    return data.train_test_split(test, train, stratify_by_column="label", seed=0)


def labelled_docstrings(sources: dict[str, list[Path]]) -> Dataset:
    """The docstrings in some files; what the files belong to is the label."""
    label_of: dict[str, str] = {}  # of a docstring that several have, the first
    for label, files in sources.items():
        label_of |= {text: label_of.get(text, label) for file in files for text in docstrings_in(file)}
    return Dataset.from_dict({"text": list(label_of), "label": list(label_of.values())}).class_encode_column("label")


def docstrings_in(file: Path) -> list[str]:
    """All docstrings of a Python file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, documented))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def image_rows(images: Dataset, processor: BaseImageProcessor) -> Rows:
    """All images, decoded and preprocessed."""
    return [
        {"pixel_values": pixel_values, "labels": label}
        for batch in images.iter(batch_size=64)
        for pixel_values, label in zip(
            processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"],
            batch["label"],
            strict=True,
        )
    ]


def image_processor(base: str, image_size: int | None) -> BaseImageProcessor:
    """That of a model, which resizes images to a size if there is one."""
    size = {} if image_size is None else {"height": image_size, "width": image_size}
    return AutoImageProcessor.from_pretrained(
        base, backend="pil", **{name: size for name in ("size", "crop_size") if size}
    )


def joined_columns(texts: Dataset) -> Dataset:
    """The texts with one column "text", in which those of all columns of strings are joined."""
    columns = [name for name, feature in texts.features.items() if getattr(feature, "dtype", None) == "string"]
    return Dataset.from_dict({"text": ["\n".join(row[name] for name in columns) for row in texts]})


def token_rows(texts: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Rows:
    """The texts tokenized, joined and cut into blocks; what is left at the end is dropped."""
    tokens = tokenizer(list(texts["text"]))["input_ids"]
    # Not every tokenizer marks where a text starts or ends.
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    ends = [tokenizer.eos_token_id] if marks.isdisjoint(tokens[0][:1] + tokens[0][-1:]) else []
    joined = list(chain.from_iterable(text + ends for text in tokens))
    blocks = [joined[start : start + block_size] for start in range(0, len(joined) - block_size + 1, block_size)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def labelled_tokens(texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """Tokens and class of each text."""
    tokens = tokenizer(list(texts["text"]), truncation=True, max_length=max_length)
    columns = {**tokens, "labels": texts["label"]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def image_batch(rows: Rows, image_size: int | None) -> dict[str, Any]:
    """A batch of images, which `image_processor` may have resized."""
    resized = {} if image_size is None else {"interpolate_pos_encoding": True}
    return default_data_collator(rows) | resized


def small_vit(folder: Path, steps: int, with_head: bool = False) -> str:
    """The name of a small ViT; pre-trained at first use on the digits 0 to 4, saved with its head or without."""
    if not (folder / "model.safetensors").exists():
        processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        size = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "intermediate_size": 128}
        model = ViTForImageClassification(ViTConfig(**size, num_hidden_layers=4, num_attention_heads=4, num_labels=5))
        rows = image_rows(digits(range(5), examples_per_class=150)["train"], processor)
        pretrain(model, rows, str(folder), steps, batch_size=64)
        processor.save_pretrained(folder)
        (model if with_head else model.vit).save_pretrained(folder)
    return str(folder)


def small_bert(folder: Path, steps: int) -> str:
    """The name of a small BERT; pre-trained at first use to tell modules of the library by their docstrings."""
    if not (folder / "model.safetensors").exists():
        data = labelled_docstrings({file.stem: [file] for file in sorted(LIBRARY.glob("*.py"))})
        tokenizer = BertTokenizer().train_new_from_iterator(data["text"], vocab_size=2000)
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        classes = len(data.features["label"].names)
        model = BertForSequenceClassification(
            BertConfig(vocab_size=len(tokenizer), **size, **no_dropout, num_labels=classes)
        )
        rows = labelled_tokens(data, tokenizer, max_length=48)
        pretrain(model, rows, str(folder), steps, batch_size=32, collate=DataCollatorWithPadding(tokenizer))
        tokenizer.save_pretrained(folder)
        model.bert.save_pretrained(folder)
    return str(folder)


def small_llama(folder: Path, steps: int, block_size: int) -> str:
    """The name of a small byte-level LLaMA; pre-trained at first use, on docstrings that are not about numbers."""
    if not (folder / "model.safetensors").exists():
        tokenizer = ByT5Tokenizer(extra_ids=0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        rows = token_rows(docstrings(numeric=False)["train"], tokenizer, block_size)
        pretrain(model, rows, str(folder), steps, batch_size=8)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def pretrain(
    model: PreTrainedModel,
    rows: Rows,
    folder: str,
    steps: int,
    batch_size: int,
    collate: Callable[[Rows], Any] = default_data_collator,
) -> None:
    """Train all of a model."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
    )
    Trainer(model, arguments, collate, rows).train()

"""Runs pass 1 over a data set once and stores what it computes, so that training runs pass 2 only.

With fixed inputs pass 1 is the same in every epoch, as it is that of the frozen model; with late feedback so are the
blocks below the loop. Everything that would make it another one is refused.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - k: 2 if the hidden states are stored beside the features, else 1
    - d: hidden size
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import Dataset
from transformers import default_data_collator
from transformers.utils import logging

from .core.stored_pass import STORED_INPUT
from .feature_shards import FeatureShards, StoredRow
from .first_pass import FirstPass, check_labels, checksum, inputs_of, padded

Collator = Callable[[list[dict[str, Any]]], Any]


def store_features(
    model: nn.Module,
    dataset: Any,
    folder: str | os.PathLike,
    *,
    batch_size: int = 32,
    data_collator: Collator = default_data_collator,
    dtype: torch.dtype | None = None,
) -> "StoredFeatures":
    """Run pass 1 over a data set and store what it computes; from then on `model` takes it as an input.

    For training over several epochs without augmentation. Call it before the Trainer makes its first dataloader. A
    call that was interrupted goes on where it stopped, a finished one opens what is there. `unload()` takes the input
    away from the model again.

    Args:
        model: has one TOAST adapter, which is active, on a transformer with one stack of blocks. Everything below the
            feedback is frozen.
        dataset: as a Trainer takes it: with a length, and with rows that are dicts.
        folder: for the files. For each token they have its features, and with `feedback_to` above 0 the hidden states
            as well.
        batch_size: rows in a forward. It need not be that of training.
        data_collator: makes batches of rows, as in a Trainer. Always the same for the same row.
        dtype: of the files; `torch.float16` halves those of a float32 model. Default: that of the features.

    Returns:
        The data set with what is stored. Its `collate` is the collator to train with.

    Raises:
        ValueError: if what is stored would not be what the model computes in training, or if the folder has something
            else; the model is unchanged then.

    Example:

    ```py
    >>> stored = toast_peft.store_features(model, train_set, "features", dtype=torch.float16)
    >>> trainer = Trainer(model=model, args=args, train_dataset=stored, data_collator=stored.collate)
    ```
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise ValueError(f"`dataset` is a {type(dataset).__name__}; expected one with a length above 0 and with rows.")
    first_pass = FirstPass(model, data_collator)
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else None
    if rank:  # the first process stores
        distributed.barrier()
    try:
        shards = _store(first_pass, dataset, folder, batch_size, dtype)
    finally:
        if rank == 0:
            distributed.barrier()
    first_pass.passes.accept_stored(first_pass.model, first_pass.origin)
    return StoredFeatures(dataset, shards, first_pass)


def _store(
    first_pass: FirstPass, dataset: Any, folder: str | os.PathLike, batch_size: int, dtype: torch.dtype | None
) -> FeatureShards:
    """The complete files, after checks that they are right."""
    [first] = first_pass.check([dataset[0]])
    if first_pass([dataset[0]])[0].checksum != first.checksum:
        raise ValueError(_OTHER_INPUTS.format(row=0))
    dtype = dtype or first_pass.dtype
    key = first_pass.key() | {"dtype": str(dtype).removeprefix("torch."), "rows": len(dataset)}
    shards = FeatureShards(folder, key)
    if shards.num_rows > 0:
        _check_row(first, shards[0], folder)
    todo = range(shards.num_rows, len(dataset), batch_size)
    is_padding_checked = False
    try:
        for start in logging.tqdm(todo, desc="Storing features", disable=not todo):
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            computed = first_pass(rows)
            others = [index for index, row in enumerate(computed) if len(row.features) != len(first.features)]
            if others and not is_padding_checked:
                first_pass.check_padding([dataset[0], rows[others[0]]])
                is_padding_checked = True
            shards.append(StoredRow(row.features.to("cpu", dtype), row.checksum) for row in computed)
    finally:
        shards.flush()
    return shards


def _check_row(computed: StoredRow, stored: StoredRow, folder: str | os.PathLike) -> None:
    """Compare what a row has now with what is stored of it, as the key does not know all of a model's state."""
    if computed.checksum != stored.checksum:
        raise ValueError(_OTHER_INPUTS.format(row=0))
    expected, found = computed.features.cpu(), stored.features.to(computed.features.dtype)
    if not torch.allclose(found, expected, rtol=0, atol=0.02 * expected.abs().max().item(), equal_nan=True):
        raise ValueError(
            f"The features of row 0 in {str(folder)!r} are not those that the model computes now; expected the same. "
            "Activate the adapters that were active then, or store them in another folder."
        )


_OTHER_INPUTS = (
    "The inputs of row {row} are not those that the stored features were computed from; expected the same in every "
    "epoch. Features cannot be stored with augmentation, random masking or other preprocessing: train without them, "
    "or store them anew in another folder if the preprocessing has changed for good."
)


class GivenRow:
    """What is stored of a row, on its way from the data set to `collate`.

    Args:
        index: of the row.
        stored: what is stored of it.
    """

    def __init__(self, index: int, stored: StoredRow) -> None:
        self.index = index
        self.stored = stored

    # What another collator asks for to make a tensor of it.
    def __len__(self) -> int:
        raise ValueError(
            "A batch of rows with stored features was made by another collator than that of the `StoredFeatures`; "
            "give its own to the Trainer or the DataLoader, as in `data_collator=stored.collate`."
        )

    def __getitem__(self, index: int) -> None:
        len(self)


class StoredFeatures(Dataset):
    """A data set with the features of pass 1, made by [`store_features`].

    Args:
        dataset: has the rows.
        shards: have what is stored of each.
        first_pass: has computed that.
    """

    def __init__(self, dataset: Any, shards: FeatureShards, first_pass: FirstPass) -> None:
        self.dataset = dataset
        self.shards = shards
        # Not the model: processes of a dataloader get a copy of all that is here.
        self.data_collator = first_pass.data_collator
        self.input_names = first_pass.input_names
        self.predicts_next_token = first_pass.predicts_next_token
        self.dtype = first_pass.dtype

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {**self.dataset[index], STORED_INPUT: GivenRow(index, self.shards[index])}

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """A batch of rows with `topdown_features`; of rows of another data set, without.

        Args:
            rows: of this data set, all or none of them.

        Raises:
            ValueError: if the inputs of a row are not those that its features were computed from, if its tokens
                cannot be told from padding, or if the loss would depend on padding.
        """
        stored: list[GivenRow] = [row[STORED_INPUT] for row in rows if STORED_INPUT in row]
        batch = self.data_collator([{k: v for k, v in row.items() if k != STORED_INPUT} for row in rows])
        if not stored:
            return batch
        if len(stored) < len(rows):
            raise ValueError(f"{len(stored)} of {len(rows)} rows have stored features; expected all or none.")
        inputs = inputs_of(batch, self.input_names, len(rows))
        check_labels(batch, inputs, self.predicts_next_token)
        for position, given in enumerate(stored):
            if checksum(inputs, position) != given.stored.checksum:
                raise ValueError(_OTHER_INPUTS.format(row=given.index))
        batch[STORED_INPUT] = padded([given.stored.features for given in stored], inputs).to(self.dtype)
        return batch

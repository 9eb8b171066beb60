"""The files of stored features: a folder of safetensors, mapped into memory when they are read.

    features.json                     what the features are of; another such key is refused
    rows_000000000.safetensors        the rows 0, 1, ... one after the other, named by the first of them

Notation used for tensor shapes:
    - rows: number of examples in a file
    - n: number of tokens of an example
    - k: 2 if the hidden states are stored beside the features, else 1
    - d: hidden size
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_KEY = "features.json"
_ROWS = "rows_"
# What an interrupted call has to compute again at most.
SHARD_BYTES = 128 * 2**20


def _shard_name(start: int) -> str:
    return f"{_ROWS}{start:09d}.safetensors"


class StoredRow(NamedTuple):
    """What is stored of one example.

    Args:
        features: the features of its own tokens and, beside them, the hidden states. Shape: [n, k, d]
        checksum: of the inputs that they were computed from.
    """

    features: torch.Tensor
    checksum: int


class _Shard(NamedTuple):
    """One file.

    Args:
        file: the open file.
        ends: where the tokens of each row end.
        checksums: of each row.
    """

    file: Any
    ends: list[int]
    checksums: list[int]

    def row(self, index: int) -> StoredRow:
        start = self.ends[index - 1] if index > 0 else 0
        return StoredRow(self.file.get_slice("features")[start : self.ends[index]], self.checksums[index])


class FeatureShards:
    """The rows in a folder, from the first of the data set on.

    Args:
        folder: where the files are, or will be.
        key: what the features are of.

    Raises:
        ValueError: if the folder has features of something else, or a file is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike, key: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.key = key
        self._check_key()
        self.starts = sorted(int(path.stem[len(_ROWS) :]) for path in self.folder.glob(f"{_ROWS}*.safetensors"))
        self.num_rows = 0
        self._open: dict[int, _Shard] = {}
        self._new: list[StoredRow] = []
        self._check_files()

    def _check_key(self) -> None:
        path = self.folder / _KEY
        if not path.exists():
            if any(self.folder.glob(f"{_ROWS}*")):
                raise ValueError(f"{str(self.folder)!r} has stored features, but no {_KEY}; expected both. Delete it.")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON ({error}); delete the folder to store anew.") from error
        different = [name for name in self.key if found.get(name) != self.key[name]]
        if different:
            described = "; ".join(f"{name} was {found.get(name)!r}, is {self.key[name]!r}" for name in different)
            raise ValueError(
                f"{str(self.folder)!r} has stored features of something else: {described}. Expected those of this "
                "model, adapter and data set; name another folder, or delete this one."
            )

    def _check_files(self) -> None:
        for number, start in enumerate(self.starts):
            if start != self.num_rows:
                raise ValueError(
                    f"{str(self.folder)!r} has no file with the rows from {self.num_rows} to {start - 1}; expected "
                    "all. Delete the files of the rows that come after them to have these computed again."
                )
            self.num_rows += len(self._shard(number).ends)

    def _shard(self, number: int) -> _Shard:
        """The file of this number, opened once in each process."""
        if number not in self._open:
            path = self.folder / _shard_name(self.starts[number])
            try:
                file = safe_open(path, framework="pt")
                ends, checksums = (file.get_tensor(name).tolist() for name in ("ends", "checksums"))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{str(path)!r} cannot be read ({error}); expected a file of stored features. Delete it and all "
                    "that come after it to have them computed again."
                ) from error
            self._open[number] = _Shard(file, ends, checksums)
        return self._open[number]

    def __getitem__(self, index: int) -> StoredRow:
        number = bisect_right(self.starts, index) - 1
        return self._shard(number).row(index - self.starts[number])

    def append(self, rows: Iterable[StoredRow]) -> None:
        """Add rows; they are written when there are enough for a file."""
        self._new += rows
        if sum(row.features.nbytes for row in self._new) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _KEY).exists():
            text = json.dumps(self.key, indent=2) + "\n"
            self._write(_KEY, lambda path: path.write_text(text, encoding="utf-8"))
        tensors = {
            "features": torch.cat([row.features for row in self._new]),
            "ends": torch.tensor(list(accumulate(len(row.features) for row in self._new))),
            "checksums": torch.tensor([row.checksum for row in self._new]),
        }
        self._write(_shard_name(self.num_rows), lambda path: save_file(tensors, path))
        self.starts.append(self.num_rows)
        self.num_rows += len(self._new)
        self._new = []

    def _write(self, name: str, write: Any) -> None:
        """Write a file that is there as a whole or not at all."""
        unfinished = self.folder / f"unfinished_{os.getpid()}_{name}"
        write(unfinished)
        os.replace(unfinished, self.folder / name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a file that is mapped into memory cannot be sent to another process

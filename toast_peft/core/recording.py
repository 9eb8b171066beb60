"""Keeps pass 1 out of what transformers records (hidden states, attentions) around the module that is run twice."""

from typing import Any

import torch

try:
    from transformers.utils import output_capturing
except ImportError:  # a later version records in another way; the tests look whether pass 1 is recorded
    _collector: Any = None
else:
    _collector = getattr(output_capturing, "_active_collector", None)


def _record() -> dict[str, Any] | None:
    """What transformers is recording, by name, `None` if nothing."""
    # What nobody has set while a forward is traced is in a ContextVar, which cannot be traced; and so it is empty.
    is_unset = _collector is None or (torch.compiler.is_compiling() and not _collector.compiling)
    return None if is_unset else _collector.get()


def is_recording() -> bool:
    """Whether something is recorded for a model whose forward is running."""
    return bool(_record())


class RecordingPaused:
    """A context in which nothing is recorded for a model whose forward is running.

    A model that is run twice starts a record of its own in each pass. An encoder in a model does not: what both of its
    passes compute would be in the record of the model.
    """

    def __enter__(self) -> None:
        self.record = _record()
        if self.record is not None:
            _collector.set(None)

    def __exit__(self, *error: Any) -> None:
        if self.record is not None:
            _collector.set(self.record)

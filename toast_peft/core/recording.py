"""Keeps pass 1 out of what transformers records (hidden states, attentions) around the module that is run twice."""

from typing import Any

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # a later version records in another way; the tests look whether pass 1 is recorded
    _active_collector = None


class RecordingPaused:
    """A context in which nothing is recorded for a model whose forward is running.

    A model that is run twice starts a record of its own in each pass. An encoder in a model does not: what both of its
    passes compute would be in the record of the model.
    """

    def __enter__(self) -> None:
        self.record = None if _active_collector is None else _active_collector.get()
        if self.record is not None:
            _active_collector.set(None)

    def __exit__(self, *error: Any) -> None:
        if self.record is not None:
            _active_collector.set(self.record)

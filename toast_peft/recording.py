"""Keeps pass 1 out of what transformers records (hidden states, attentions) around the module that is run twice."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.output_capturing import _active_collector


@contextmanager
def recording_paused() -> Iterator[None]:
    """Inside, nothing is recorded for a model whose forward is running.

    A model that is run twice starts a record of its own in each pass. An encoder in a model does not: what both of its
    passes compute would be in the record of the model.
    """
    record = _active_collector.get()
    if record is None:
        yield
        return
    _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.set(record)

"""Pass 2 only where there is feedback: a row of the batch whose mask is zero everywhere is *closed*.

With LoRA of pass 2, which does not ask the prompt, it is the row whose gate is. Nothing is added there, so pass 2
would compute what pass 1 has computed. Its blocks return that again; the *open* rows run a second time by themselves
where the arguments of the forward can be cut into rows, else the whole batch does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import Cache

from .active_adapters import ActiveAdapter

# Arguments of which each row belongs to one row of the batch, by what transformers calls them.
_OF_ROWS = {
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "encoder_hidden_states"),
    *("encoder_attention_mask", "pixel_values", "pixel_mask", "bool_masked_pos", "input_values", "input_features"),
}


def may_skip_rows(adapters: Iterable[ActiveAdapter]) -> bool:
    """Whether pass 2 is left out where there is no feedback: in inference, where a forward may look at numbers."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return all(adapter.config.skip_closed_rows for adapter in adapters)


def rows_of_arguments(kwargs: dict[str, Any], rows: torch.Tensor, batch_size: int) -> dict[str, Any] | None:
    """The arguments of a forward for some rows of the batch, `None` if they cannot be cut into rows."""
    cut = {}
    for name, value in kwargs.items():
        axis = _axis_of_rows(name, value)
        if isinstance(value, torch.Tensor) and value.shape[axis : axis + 1] == (batch_size,) and name in _OF_ROWS:
            value = value.index_select(axis, rows.to(value.device))
        elif not isinstance(value, (bool, int, float, str, type(None))):
            return None
        cut[name] = value
    return cut


def _axis_of_rows(name: str, value: Any) -> int:
    # Qwen-VL has a position in time, of height and of width for each token. Shape: [3, b, n]
    return 1 if name == "position_ids" and isinstance(value, torch.Tensor) and value.dim() == 3 else 0


def rows_of(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """Some rows of a tensor or of the tensors in a tuple. Shape of each: [b, ...] -> [number of rows, ...]"""
    if isinstance(value, tuple):
        return tuple(rows_of(item, rows, batch_size) for item in value)
    is_batch = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == batch_size
    return value[rows.to(value.device)] if is_batch else value


def has_rows(output: Any, batch_size: int, cache: Cache | None = None) -> bool:
    """Whether each tensor in an output, which may have a cache in it, has a row for each row of the batch."""
    if isinstance(output, (dict, tuple, list)):
        items = output.values() if isinstance(output, dict) else output
        return all(has_rows(item, batch_size, cache) for item in items)
    is_batch = isinstance(output, torch.Tensor) and output.shape[:1] == (batch_size,)
    return is_batch or output is None or output is cache


def put_rows(output: Any, rows: torch.Tensor, of_rows: Any) -> Any:
    """What a forward gives for the whole batch, with some rows replaced by what it gives for these alone.

    Args:
        output: an output of transformers, a tuple or a tensor; a cache in it stays. Shape of each tensor: [b, ...]
        rows: the indices of the rows.
        of_rows: the same for these. Shape of each tensor: [number of rows, ...]

    Returns:
        A new output.
    """
    if isinstance(output, dict):  # a ModelOutput
        return type(output)(**{name: put_rows(value, rows, of_rows[name]) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(put_rows(item, rows, part) for item, part in zip(output, of_rows, strict=True))
    return output.index_copy(0, rows.to(output.device), of_rows) if isinstance(output, torch.Tensor) else output

"""Mixed batches: `adapter_names=[...]` in a forward or in `generate` says which adapter each row is for.

Pass 1 runs once for all rows, each adapter computes the feedback of its own rows, and pass 2 runs once. Rows of the
base model get none. Modules that the adapters train as a whole (`modules_to_save`) run with those of each row, by
what PEFT has for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .active_adapters import RowNames
from .batch_rows import num_rows

if TYPE_CHECKING:
    from .layers import FeedbackPath
    from .run import ThreadState

BASE = "__base__"  # PEFT's name for the model without an adapter


@contextmanager
def mixed_batch(
    model: nn.Module, paths: Sequence["FeedbackPath"], adapter_names: Any, args: tuple, kwargs: dict[str, Any]
) -> Iterator[None]:
    """In it, each row of the batch runs with an adapter of its own, in this thread.

    Args:
        model: has the adapters.
        paths: its feedback paths.
        adapter_names: one for each row; `None` or "__base__" for the base model.
        args: what the model is called with.
        kwargs: the same.

    Raises:
        ValueError: if these are no names of adapters, as many as there are rows, or the model is in training mode.
    """
    names = _checked(model, paths, adapter_names, num_rows(args, kwargs))
    currents = [path.state.current for path in paths]
    if any(current.prompt is not None for current in currents):
        raise ValueError(
            "`adapter_names` was given in a `with model.prompted(...)` block; expected one adapter there."
        )
    before = [current.row_names for current in currents]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = _NamesOfRows(module, paths[0].state)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            for current in currents:
                current.row_names = names
            yield
        finally:
            for current, outer in zip(currents, before, strict=True):
                current.row_names = outer


def _checked(model: nn.Module, paths: Sequence["FeedbackPath"], adapter_names: Any, number: int | None) -> RowNames:
    """The names of adapters, `None` for the base model."""
    if model.training:
        raise ValueError("`adapter_names` was given and the model is in training mode; call `model.eval()` first.")
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence) or len(adapter_names) == 0:
        raise ValueError(f"`adapter_names` is {adapter_names!r}; expected a list with one name for each row.")
    names = tuple(None if name == BASE else name for name in adapter_names)
    known = sorted({name for path in paths for name in path.selection.topdown_config})
    unknown = [name for name in dict.fromkeys(names) if name is not None and name not in known]
    if unknown:
        raise ValueError(
            f"`adapter_names` names {unknown}, and the TOAST adapters of the model are {known}; expected one of them "
            f"for each row, or {BASE!r} for the base model."
        )
    if number not in (None, len(names)):
        raise ValueError(
            f"`adapter_names` has {len(names)} names and the batch has {number} rows; expected one name for each row."
        )
    return RowNames(names)


class _NamesOfRows:
    """A hook that tells a module which PEFT has wrapped the adapter of each row of its input.

    Args:
        wrapper: the module.
        state: has the names, in the thread of the forward; others run the module as it is.
    """

    def __init__(self, wrapper: AuxiliaryTrainingWrapper, state: "ThreadState") -> None:
        self.available = wrapper._get_available_adapters()
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        names = self.state.current.row_names
        if names is None:
            return None
        of_rows = names.of_batch(len(args[0])) if args else names.names
        return args, kwargs | {"adapter_names": [name if name in self.available else BASE for name in of_rows]}


def has_modules_of_rows(module: nn.Module) -> bool:
    """Whether something in a module runs with the modules of each row, and so with all rows of the batch."""
    return any(isinstance(part, AuxiliaryTrainingWrapper) for part in module.modules())

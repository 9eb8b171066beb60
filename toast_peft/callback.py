"""Shows in training whether feedback gets through: the share of open tokens, the mean mask, the variational loss."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback

from .collecting import device_of_inputs
from .core.layers import FeedbackPath, feedback_paths
from .core.padding import own_tokens
from .core.run import Selected
from .core.variational_loss import last_variational_loss
from .explanation.explain import explain

if TYPE_CHECKING:
    from transformers import Trainer

_TURNED_AWAY = (
    "At step {step} the prompt of the TOAST adapter has turned away from all tokens ({names} is 0): there is no "
    "feedback and nothing of it learns any more, whatever the loss does; start anew with a lower learning rate (2e-4 "
    "for image classifiers, 1e-3 for Lite, 3e-3 for language models are good), after "
    "`toast_peft.initialize_feedback(model, dataloader)`."
)


def feedback_statistics(model: nn.Module) -> dict[str, float]:
    """How much the mask let through in the last forward with an active adapter.

    It is computed, and waited for, when it is asked for; a forward only keeps its mask. In distributed training it is
    about the rows of this process, in generation about the last step, in threads about the last forward of the own
    thread.

    Args:
        model: has the adapter, as a PEFT model or injected directly.

    Returns:
        `open_tokens`, the share of the tokens whose mask is above 0, and `mean_mask`, both from 0 to 1 and over all
        tokens of the batch but padding (`attention_mask` 0); with a gate `mean_gate` as well. Of an encoder-decoder
        `encoder_open_tokens`, `decoder_open_tokens` and so on; of several adapters `law_open_tokens`, by their names,
        and in a mixed batch over the rows of each. Empty before the first forward, and where all tokens are padding.
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, FeedbackPath)}
    statistics: dict[str, float] = {}
    for name, path in named.items():
        prefix = "" if len(named) == 1 else f"{name.split('.')[-2]}_"
        current = path.state.current
        for adapter_name, selected in current.selected.items():
            of_adapter = prefix if len(current.selected) == 1 else f"{prefix}{adapter_name}_"
            values = _statistics_of(selected, current.attention_mask)
            statistics |= {of_adapter + key: value for key, value in values.items()}
    return statistics


def _statistics_of(selected: Selected, attention_mask: Any) -> dict[str, float]:
    if selected.mask is None:
        return {}
    own = _own_tokens(selected, attention_mask)
    values = mask_statistics(selected.mask, own)
    if selected.gate is not None and values:
        values["mean_gate"] = mask_statistics(selected.gate, own)["mean_mask"]
    return values


def _own_tokens(selected: Selected, attention_mask: Any) -> torch.Tensor | None:
    """Which tokens of a mask are not padding; if that cannot be told, a warning says so. Shape: [b, n]"""
    assert selected.mask is not None
    rows, shape = selected.rows, selected.mask.shape[:-1]
    try:
        own = own_tokens(attention_mask, shape if rows is None else (rows.batch_size, *shape[1:]), has_cache=True)
    except ValueError as error:
        warnings.warn(f"The statistics of the feedback count padding as well: {error}", stacklevel=4)
        return None
    return own if own is None or rows is None else rows.of(own)


def mask_statistics(mask: torch.Tensor, own: torch.Tensor | None) -> dict[str, float]:
    """The share of open tokens and the mean of a mask.

    Args:
        mask: Shape: [b, n, 1], or of a map of tokens [b, h, w, 1]
        own: which tokens are not padding; `None` if all. Shape: [b, n]

    Returns:
        `open_tokens` and `mean_mask`; nothing if there are no tokens to count.
    """
    mask = mask.flatten(1).float()
    counted = torch.ones_like(mask) if own is None else own.to(mask)
    sums = torch.stack([((mask > 0) * counted).sum(), (mask * counted).sum(), counted.sum()])
    num_open, total, num_tokens = sums.tolist()
    return {"open_tokens": num_open / num_tokens, "mean_mask": total / num_tokens} if num_tokens else {}


def closed_by_prompt(statistics: Mapping[str, float]) -> list[str]:
    """The names of those that say that a prompt selects nothing; under a closed gate that is no fault of it."""
    ending = "open_tokens"
    closed = [name for name, value in statistics.items() if name.endswith(ending) and value == 0]
    return [name for name in closed if statistics.get(name.removesuffix(ending) + "mean_gate") != 0]


def _trains_feedback(model: nn.Module) -> bool:
    """Whether there is more to train than what is added in pass 2."""
    parts = [part for _, path in feedback_paths(model) for part in (path.selection, path.layers)]
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


class FeedbackCallback(TrainerCallback):
    """Logs `feedback_statistics` of the last training step, and the variational loss, when the trainer logs the loss.

    It warns, once, when no token is open any more. Nothing is computed in other steps.

    With `samples` it also draws what `explain` shows of them, so that one sees the selection form: into the folder
    `feedback` of the output folder, and to TensorBoard and Trackio where the trainer reports to them.

    Args:
        trainer: logs it, so that it goes wherever the trainer's logs go.
        samples: inputs of the model, a few rows; `None` for no pictures.
        picture_steps: a picture before the first step, after each of so many, and after the last one.
        stack: where several stacks of blocks have feedback, the one to draw, as in [`explain`].
        adapter_name: where several adapters are active, the one to draw.

    Example:

    ```py
    >>> trainer = Trainer(model=model, args=args, train_dataset=train_set)
    >>> trainer.add_callback(toast_peft.FeedbackCallback(trainer))
    ```
    """

    def __init__(
        self,
        trainer: "Trainer",
        samples: Mapping[str, Any] | None = None,
        picture_steps: int = 100,
        stack: str | None = None,
        adapter_name: str | None = None,
    ) -> None:
        self.trainer = trainer
        self.samples = samples
        self.picture_steps = picture_steps
        self.drawn = {"stack": stack, "adapter_name": adapter_name}
        self.has_warned = False

    def on_step_begin(  # type: ignore[override]  # the trainer always gives `model`
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Draw what is there after the steps so far; those of the last step have been logged."""
        if state.global_step % self.picture_steps == 0:
            self._draw(args, state, model)

    def _draw(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self.samples is None:
            return
        device = device_of_inputs(model)
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self.samples.items()}
        # In each process, as it may hold a shard.
        explanation = explain(model, inputs, self.trainer.processing_class, **self.drawn)
        if not state.is_world_process_zero:
            return
        figure, folder = explanation.plot(), Path(str(args.output_dir), "feedback")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step_{state.global_step:06d}.png"
        figure.savefig(file, dpi=110)
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_figure("feedback", figure, state.global_step)
            elif isinstance(callback, TrackioCallback):
                trackio: Any = import_module("trackio")  # it is there, as the callback is
                # Without `step`, as the callback logs, which Trackio counts for itself.
                trackio.log({"feedback": trackio.Image(str(file)), "train/global_step": state.global_step})

    def on_log(  # type: ignore[override]  # the trainer always gives `model` and `logs`
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """After the loss of some steps has been logged, and before anything else runs."""
        if "train_loss" in logs:  # training is over; in `on_train_end` the trainer's reports are closed already
            self._draw(args, state, model)
        if "loss" not in logs:  # of an evaluation, or what is logged here
            return
        statistics = feedback_statistics(model)
        closed = closed_by_prompt(statistics)
        if closed and not self.has_warned and _trains_feedback(model):
            self.has_warned = True
            warnings.warn(_TURNED_AWAY.format(step=state.global_step, names=" and ".join(closed)), stacklevel=2)
        metrics = {f"feedback_{name}": value for name, value in statistics.items()}
        loss = last_variational_loss(model)
        if loss is not None:
            metrics["variational_loss"] = loss.item()
        if metrics:
            self.trainer.log(metrics)

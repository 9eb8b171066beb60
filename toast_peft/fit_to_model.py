"""Whether a config fits the model that it is for, found out before the model is touched."""

from peft import TaskType
from torch import nn

from .config import TopDownConfig
from .core.stack import Stack

# Modules that PEFT itself adds to `modules_to_save` by task type, whether the model has them or not.
ADDED_BY_PEFT = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def check_task_type(model: nn.Module, config: TopDownConfig) -> None:
    """Refuse a task that the model is not for.

    Raises:
        ValueError: if it is to generate text, and the model does not.
    """
    # The PEFT models of these tasks ask the model for it when the adapter is in it already.
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type={TaskType(config.task_type).value!r}` is for a model that generates text, which "
            f"{type(model).__name__} does not; leave it out, or adapt the model with its language modelling head."
        )


def check_modules_to_save(model: nn.Module, config: TopDownConfig, stack: Stack) -> None:
    """Refuse `modules_to_save` that would not be trained, or not get their feedback.

    Raises:
        ValueError: if there is no such module, or one is within another, or has blocks in it.
    """
    names = [name for name, _ in model.named_modules()]
    added = ADDED_BY_PEFT.get(TaskType(config.task_type), ()) if config.task_type is not None else ()
    for wanted in config.modules_to_save or []:
        matched = [name for name in names if name.endswith(wanted)]  # as PEFT does
        if not matched and wanted not in added:
            raise ValueError(
                f"`modules_to_save` names {wanted!r}, but {type(model).__name__} has no such module; its own are "
                f"{[name for name, _ in model.named_children()]}."
            )
        nested = [name for name in matched if any(name.startswith(f"{other}.") for other in matched)]
        if nested:
            raise ValueError(
                f"`modules_to_save` names {wanted!r}, which matches {nested[0]!r} inside of another match; PEFT would "
                f"train a copy of it that is not used. Name just one of {matched}."
            )
        if any(f"{name}.".startswith(f"{match}.") for match in matched for name in stack.adapted_names):
            raise ValueError(
                f"`modules_to_save` names {wanted!r}, which is or holds a block or a module that gets "
                "feedback; PEFT would copy it and the copy get none. Name modules inside of a block, or fine-tune all."
            )

"""`TopDownModel`: TOAST as a PEFT tuner."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .block_stack import BlockStack
from .callback import feedback_statistics
from .config import TopDownConfig
from .convolutional_feedback import ConvolutionalFeedbackPath
from .feedback import NO_MERGE, FeedbackPath, TopDownLayer, belongs_to, feedback_paths
from .find_stacks import find_stacks
from .hierarchical_feedback import HierarchicalFeedbackPath
from .hierarchical_passes import TwoPassesOverHierarchy
from .hierarchical_stack import HierarchicalStack
from .passes import TwoPasses
from .pretrained_feedback import copy_weights, start_from_pretrained
from .prompt_start import start_prompts
from .stage_passes import TwoPassesOverStages
from .stage_stack import StageStack
from .variational_loss import last_variational_loss

# Modules that PEFT itself adds to `modules_to_save` by task type, whether the model has them or not.
_HEADS_ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}


class TopDownModel(BaseTuner):
    """Adapts a frozen model with TOAST (https://arxiv.org/abs/2305.15542).

    Made by `get_peft_model(model, TopDownConfig(...))`. All parameters it adds to the model are in a `feedback_path`
    ([`FeedbackPath`]) on the module that owns the blocks; that module then runs twice in each forward. In an
    encoder-decoder model both stacks have one. That module and its blocks get another `forward`, the value projections
    and the model hooks; `unload()` takes all of it away.
    """

    prefix: str = "topdown_"
    tuner_layer_cls = TopDownLayer
    target_module_mapping: ClassVar[dict] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # For new adapters that start from a saved one its weights, until PEFT has chosen their dtype.
        self._pretrained: dict[str, dict[str, torch.Tensor]] = {}
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model; called by PEFT. On failure the model is as it was before."""
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config = self.peft_config[adapter_name]
            is_loaded = config.is_of_saved_adapter and config.pretrained_feedback is None
            if config.pretrained_feedback is not None:
                self._pretrained[adapter_name] = start_from_pretrained(self.model, adapter_name, config)
            elif not is_loaded:
                start_prompts(self.model, adapter_name)
        except Exception:
            _undo_injection(model, adapter_name, trainable)
            raise
        if is_loaded:
            for stack in self._stacks:
                stack.backbone.feedback_path.awaiting_weights[adapter_name] = trainable

    def _prepare_adapter_config(self, peft_config: TopDownConfig, model_config: dict) -> TopDownConfig:
        # Everything that can be wrong with the config is found here, before the model is touched.
        self._stacks = find_stacks(self.model, peft_config)
        for stack in self._stacks:
            _check_modules_to_save(self.model, peft_config, stack)
            if peft_config.normalize_features and stack.final_norm is None:
                raise ValueError(
                    f"`normalize_features=True`, but {stack.model_type!r} has no final norm or it is not known; leave "
                    "it at None or False."
                )
        adapter_name = next(name for name, config in self.peft_config.items() if config is peft_config)
        if peft_config.pretrained_feedback is not None:  # the caller's object stays as it is, to be used again
            peft_config = copy(peft_config)
        peft_config = self.peft_config[adapter_name] = _with_base_model_facts(peft_config, self._stacks)
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        if any(key in stack.excluded for stack in self._stacks):
            return check_target_module_exists(peft_config, key)  # PEFT's own mark of an excluded module
        return any(key in stack.names for stack in self._stacks)

    def _create_and_replace(
        self,
        peft_config: TopDownConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # Nothing is replaced: the value projection stays what it is, be it quantised or wrapped by another method.
        stack = next(stack for stack in self._stacks if current_key in stack.names)
        if not isinstance(getattr(stack.backbone, "feedback_path", None), FeedbackPath):
            _add_feedback_path(stack)
            stack.backbone.feedback_path.passes.add_loss_hook(self.model)
        path = stack.backbone.feedback_path
        if adapter_name not in path.selection.topdown_config:
            path.selection.update_layer(adapter_name, peft_config, stack.hidden_size)
        index = stack.names[current_key]
        path.add_block(index, target, peft_config).update_layer(adapter_name, peft_config)
        path.passes.add_value_projection(index, target, stack.value_columns)

    # -------------------------------------------------------------------------------------------------- pre-tuning

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # They were copied into parameters of the base model's dtype, which may have rounded them.
        copy_weights(self.model, self._pretrained.pop(adapter_name, {}))

    def variational_loss(self) -> torch.Tensor:
        """The variational loss of the last forward in training mode, for a loss computed outside of the model.

        Call it after each such forward; forwards in evaluation mode or with the adapter disabled do not count.

        Returns:
            The loss times `variational_weight`, once: zero if the model has added it to its own loss, or if
            `variational_weight` is 0.
        """
        hooks = [path.passes.loss_hook for _, path in feedback_paths(self.model)]
        losses = [loss for loss in (hook.take() for hook in hooks) if loss is not None]
        return sum(loss.to(losses[0].device) for loss in losses) if losses else torch.zeros(())

    @property
    def last_variational_loss(self) -> torch.Tensor | None:
        """The last variational loss that became a part of a loss, times its weight, without gradient; to be logged."""
        return last_variational_loss(self.model)

    def feedback_statistics(self) -> dict[str, float]:
        """The share of open tokens and the mean mask of the last forward, see [`feedback_statistics`]."""
        return feedback_statistics(self.model)

    # --------------------------------------------------------------------------------------- switching and removing

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others becomes active."""
        super().delete_adapter(adapter_name)
        # Each layer chose a new active adapter among those it has itself; make them agree.
        if self.active_adapter:
            self.set_adapter(self.active_adapter)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for backbone, _ in list(feedback_paths(self.model)):
            _remove_feedback_path(backbone)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # When unloading, for what `modules_to_save` has wrapped. PEFT's own also copies `weight`, which an
        # nn.Sequential, as the classifier of a ResNet, does not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NO_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "TOAST does not support `adapter_names`, a different adapter for each row of a batch. Run the rows of "
                "each adapter in a batch of their own, after `set_adapter`."
            )
        yield

    # ----------------------------------------------------------------------------------------------------- loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TopDownConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        expected = {
            name: tuple(parameter.shape)
            for name, parameter in base_model.named_parameters()
            if belongs_to(adapter_name, name)
        }
        found = {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in remapped.items()}
        problems = describe_differences(expected, {name: found[name] for name in found if cls.prefix in name})
        trainable = [path.awaiting_weights.pop(adapter_name, None) for _, path in feedback_paths(base_model)]
        if problems:
            if any(names is not None for names in trainable):
                _undo_injection(base_model, adapter_name, set().union(*filter(None, trainable)))
            raise ValueError(
                f"The weights of the TOAST adapter {adapter_name!r} do not fit its config and this model: "
                + "; ".join(problems)
            )
        return remapped


def _with_base_model_facts(config: TopDownConfig, stacks: list[BlockStack]) -> TopDownConfig:
    """Put into the config what it is for; of a saved adapter, raise if that is another model than this one."""
    facts = {
        "backbone_type": stacks[0].model_type,
        "num_blocks": len(stacks[0].blocks) if len(stacks) == 1 else [len(stack.blocks) for stack in stacks],
        "hidden_size": stacks[0].hidden_size,
    }
    made_for = {name: getattr(config, name) for name in facts}
    different = [name for name, value in made_for.items() if value is not None and value != facts[name]]
    if different and config.is_of_saved_adapter:
        raise ValueError(
            "This TOAST adapter does not fit the base model: "
            + "; ".join(
                f"it was made for {name}={made_for[name]!r}, the model has {facts[name]!r}" for name in different
            )
            + "."
        )
    if different:  # the same config object, used for another model before
        config = copy(config)
    for name, value in facts.items():
        setattr(config, name, value)
    return config


def _check_modules_to_save(model: nn.Module, config: TopDownConfig, stack: BlockStack) -> None:
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or []:
        matched = [name for name in names if name.endswith(wanted)]  # as PEFT does
        if not matched and wanted not in _HEADS_ADDED_BY_PEFT:
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


def describe_differences(expected: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """What differs between two sets of named shapes, in words; empty if nothing does."""
    problems = []
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{what}: {', '.join(sorted(names))}")
    shapes = [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    return problems + shapes


def _add_feedback_path(stack: BlockStack) -> None:
    if isinstance(stack, StageStack):
        path = ConvolutionalFeedbackPath(stack.nodes)
        path.passes = TwoPassesOverStages(stack, path)
    elif isinstance(stack, HierarchicalStack):
        path = HierarchicalFeedbackPath(stack)
        path.passes = TwoPassesOverHierarchy(stack, path)
    else:
        path = FeedbackPath(stack.value_projections[max(stack.value_projections)])
        path.passes = TwoPasses(stack, path)
    stack.backbone.feedback_path = path


def _remove_feedback_path(backbone: nn.Module) -> None:
    backbone.feedback_path.passes.remove()
    del backbone.feedback_path


def _undo_injection(model: nn.Module, adapter_name: str, trainable: set[str]) -> None:
    """Take an adapter out of a base model again, with all that came with it.

    Args:
        model: the base model.
        adapter_name: the adapter to remove. The feedback path goes with its last adapter.
        trainable: names of the parameters that required a gradient before.
    """
    for backbone, path in list(feedback_paths(model)):
        for module in path.modules():
            if isinstance(module, TopDownLayer):
                module.delete_adapter(adapter_name)
        if not path.selection.topdown_config:
            _remove_feedback_path(backbone)
    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            wrapper.delete_adapter(adapter_name, [a for a in wrapper.active_adapters if a != adapter_name])
            if not wrapper._get_available_adapters():
                model.set_submodule(name, wrapper.original_module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trainable
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config

"""`TopDownModel`: TOAST as a PEFT tuner."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_feedback import copy_weights, is_in_base_feedback, load_base_feedback
from .callback import feedback_statistics
from .config import TopDownConfig
from .core.fused_feedback import fuse, refuse_fused, unfuse
from .core.layers import feedback_path_of, feedback_paths
from .core.mixed_batch import mixed_batch
from .core.prompt_input import given_prompt
from .core.stack import Stack, remove_feedback_path
from .core.strength import rescaled, set_scales
from .core.topdown_layer import NO_MERGE, TopDownLayer, belongs_to
from .core.variational_loss import last_variational_loss, take_variational_loss, total
from .families.find import find_stacks
from .fit_to_model import ADDED_BY_PEFT, check_modules_to_save, check_task_type
from .loading import SAVED_PREFIX, Load, by_names_of_parameters, check_weights, note_causality, read_weights
from .pretrained_feedback import start_from_pretrained
from .prompt_start import start_prompts
from .snapshot import Snapshot, restored_on_failure


class TopDownModel(BaseTuner):
    """Adapts a frozen model with TOAST (https://arxiv.org/abs/2305.15542).

    Made by `get_peft_model(model, TopDownConfig(...))`. All parameters it adds to the model are in a `feedback_path`
    ([`FeedbackPath`]) on the module that owns the blocks; that module then runs twice in each forward. In an
    encoder-decoder model both stacks have one. That module and its blocks get another `forward`, the value projections
    and the model hooks; `unload()` takes all of it away.
    """

    prefix = "topdown_"
    tuner_layer_cls = TopDownLayer
    target_module_mapping: dict[str, Any] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, dict):  # it comes from a `PeftModel`, which is made for a task
            for config in peft_config.values():
                check_task_type(model, config)
        # Made now: if the model has adapters already, PEFT puts the config among theirs before the injection.
        self._loads: dict[str, Load] = {adapter_name: Load(Snapshot(model))}
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model; called by PEFT.

        An adapter of the same name, of an earlier `get_peft_model` on the same base model, is replaced. On failure the
        model is as it was before.
        """
        load = self._begin_load(adapter_name)
        with restored_on_failure(load.before):
            refuse_fused(model, "add an adapter")
            weights = read_weights(self._config_of(adapter_name))
            _drop_adapter(model, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config = self._config_of(adapter_name)
            self._start(load, adapter_name, config, has_weights=weights is not None)
            if weights is not None:
                loaded = by_names_of_parameters(model, adapter_name, weights)
                check_weights(model, adapter_name, config, loaded)
            config.saved_adapter = None
        self._end_load(adapter_name)

    def _config_of(self, adapter_name: str) -> TopDownConfig:
        return cast(TopDownConfig, self.peft_config[adapter_name])

    def _begin_load(self, adapter_name: str) -> Load:
        load = self._loads.pop(adapter_name, None)
        if load is None or load.stacks:  # there was one of this name
            load = Load(Snapshot(self))
        self._loads[adapter_name] = load
        return load

    def _start(self, load: Load, adapter_name: str, config: TopDownConfig, has_weights: bool) -> None:
        """Give a new adapter the weights that it starts with, or wait for those of a saved one."""
        is_saved = config.is_of_saved_adapter and config.pretrained_feedback is None
        if config.pretrained_feedback is not None:
            load.copied = start_from_pretrained(self.model, adapter_name, config)
        elif not is_saved or not config.inference_mode:  # the config of a saved one may be for a new one
            start_prompts(self.model, adapter_name, may_be_loaded=has_weights)
        if config.base_feedback is not None and not load.copied:
            load.copied = load_base_feedback(self.model, adapter_name, config)
        if is_saved:  # last: from here on, what changes the adapter is not part of the load
            load.wait_for_weights(self.model, adapter_name)

    def _end_load(self, adapter_name: str) -> None:
        if self._loads[adapter_name].is_over:
            del self._loads[adapter_name]

    def _prepare_adapter_config(  # type: ignore[override]  # it gets configs of ours only
        self, peft_config: TopDownConfig, model_config: dict
    ) -> TopDownConfig:
        # Everything that can be wrong with the config is found here, before the model is touched.
        adapter_name, load = next(reversed(self._loads.items()))  # the one that is being injected
        stacks = load.stacks = find_stacks(self.model, peft_config)
        for stack in stacks:
            check_modules_to_save(self.model, peft_config, stack)
            if peft_config.normalize_features and stack.final_norm is None:
                raise ValueError(
                    f"`normalize_features=True`, but {stack.model_type!r} has no final norm or it is not known; leave "
                    "it at None or False."
                )
        peft_config = self.peft_config[adapter_name] = _with_base_model_facts(_own_config(peft_config), stacks)
        return peft_config

    @property
    def _stacks(self) -> Sequence[Stack]:
        """The stacks of the adapter that is being injected."""
        return next(reversed(self._loads.values())).stacks

    def _check_target_module_exists(  # type: ignore[override]  # a static method of PEFT, which calls it on `self`
        self, peft_config: PeftConfig, key: str
    ) -> Any:
        if any(key in stack.excluded for stack in self._stacks):
            return check_target_module_exists(peft_config, key)  # PEFT's own mark of an excluded module
        return any(key in stack.names for stack in self._stacks)

    def _create_and_replace(  # type: ignore[override]  # it gets configs of ours only
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
        path = feedback_path_of(stack.backbone) or stack.add_feedback_path(self.model)
        if adapter_name not in path.selection.topdown_config:
            stack.add_adapter(path, self.model, adapter_name, peft_config)
        index = stack.names[current_key]
        path.add_block(index, target, peft_config).update_layer(adapter_name, peft_config)
        path.passes.steer(index, target)

    # ---------------------------------------------------------------------------------------------------- training

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        load = self._loads.get(adapter_name)
        if load is not None:
            copy_weights(self.model, load.copied)
            load.copied = {}
            self._end_load(adapter_name)

    def variational_loss(self) -> torch.Tensor:
        """The variational loss of the last forward in training mode, for a loss computed outside of the model.

        Call it after each such forward; forwards in evaluation mode or with the adapter disabled do not count.

        Returns:
            The loss times `variational_weight`, once: zero if the model has added it to its own loss, or if
            `variational_weight` is 0. Shape: []
        """
        taken = [take_variational_loss(path) for _, path in feedback_paths(self.model)]
        losses = [loss for loss in taken if loss is not None]
        return total(losses) if losses else torch.zeros(())

    @property
    def last_variational_loss(self) -> torch.Tensor | None:
        """The last variational loss that became a part of a loss, times its weight, without gradient. Shape: []"""
        return last_variational_loss(self.model)

    def feedback_statistics(self) -> dict[str, float]:
        """The share of open tokens and the mean mask of the last forward, see [`feedback_statistics`]."""
        return feedback_statistics(self.model)

    def train(self, mode: bool = True) -> "TopDownModel":
        """As of any module; and what checkpoints the blocks gets to know of the feedback, if it is switched on.

        Each forward sees to that as well, but one that is compiled while it does so is compiled again in the next.
        """
        self._loads.clear()  # no weights are to come any more
        if mode:
            for _, path in feedback_paths(self.model):
                path.passes.backbone_forward.wrap_checkpoints()
        return super().train(mode)

    # ---------------------------------------------------------------------------------------------------- inference

    def fuse_feedback(self) -> None:
        """Make the feedback of the active adapter fast for inference; outputs stay the same but for rounding.

        The feedback path is linear, so that one matrix (in TOAST-Lite two) gives the feedback of all blocks. Where all
        value projections are plain linear layers their weights are folded in as well. The weights of the adapter stay
        beside these matrices, and are what is saved. `disable_adapter()` works as before.

        Fused feedback is for this adapter as it is. To train, to load or change weights, or to switch, add or delete
        adapters, call `unfuse_feedback()` first; until then these are errors.

        Raises:
            ValueError: if no adapter is active, or feedback is fused already.
            NotImplementedError: for ConvNets and hierarchical transformers, and if the adapter is offloaded or
                sharded.
        """
        fuse(self.model)

    def unfuse_feedback(self) -> None:
        """Undo `fuse_feedback()`, bit for bit. Where nothing is fused it does nothing."""
        unfuse(self.model)

    def prompted(self, prompts: torch.Tensor) -> AbstractContextManager[None]:
        """Steer by request where the model is called by other code, such as a pipeline.

        In the `with` block, and in this thread, these prompts take the place of the learned one, as the argument
        `topdown_prompt` of the model does in one call. They are used each time the model runs, so that `[b, d]` is for
        batches of `b` rows.

        Args:
            prompts: one for all rows, or one for each; in generation with beams it is repeated. Shape: [d] or [b, d]

        Raises:
            ValueError: if no adapter is active, or if the prompts have another shape or type; from the model, if they
                are on another device or not as many as there are rows.

        Example:

        ```py
        >>> request = toast_peft.prompt_from(model, example)
        >>> with model.prompted(request):
        ...     pipe(image)
        ```
        """
        return given_prompt([path for _, path in feedback_paths(self.model)], prompts)

    # ----------------------------------------------------------------------------------------------------- strength

    def set_feedback_scale(self, alpha: float, adapter_name: str | None = None) -> None:
        """Multiply the feedback by alpha from now on, in training as well. Whatever it was before does not count.

        At 1.0 it is what was trained, at 0.0 none. Saving the adapter does not save it; for that set `feedback_scale`
        of its config.

        Args:
            alpha: any finite number.
            adapter_name: whose feedback. Default: that of the active adapter.

        Raises:
            ValueError: if alpha is no finite number, or there is no such adapter.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        set_scales([path.selection for _, path in feedback_paths(self.model)], names, alpha)

    def rescaled_feedback(self, multiplier: float) -> AbstractContextManager[None]:
        """Multiply the strength of all adapters in a `with` block, as PEFT's `rescale_adapter_scale` does for LoRA.

        Args:
            multiplier: any finite number. Blocks within each other multiply.

        Raises:
            ValueError: if it is no finite number.

        Example:

        ```py
        >>> with model.rescaled_feedback(0.5):
        ...     model(**inputs)
        ```
        """
        return rescaled([path.selection for _, path in feedback_paths(self.model)], multiplier)

    # --------------------------------------------------------------------------------------- switching and removing

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, or several of them, whose feedback is then summed.

        With a gate each of several opens for its own inputs. A `PeftModel` takes one name only, as with LoRA; several
        are activated by `model.base_model.set_adapter([...])`.

        Raises:
            ValueError: if there is none of a name, if the feedback of another one is fused, or if more than one of
                several has its own `modules_to_save`.
        """
        if adapter_name not in (self.active_adapter, self.active_adapters):
            refuse_fused(self.model, "switch adapters")
        unknown = [] if isinstance(adapter_name, str) else [n for n in adapter_name if n not in self.peft_config]
        if unknown:
            raise ValueError(f"There are no adapters {unknown}; expected some of {list(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others becomes active.

        Raises:
            ValueError: if its feedback is fused, or if there is none of that name.
        """
        refuse_fused(self.model, "delete it", adapter_name)
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # Each layer chose a new active adapter among those it has itself; make them agree.
        if was_active and self.active_adapter:
            self.set_adapter(self.active_adapter)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for backbone, path in list(feedback_paths(self.model)):
            remove_feedback_path(backbone, path)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # When unloading, for what `modules_to_save` has wrapped. PEFT's own also copies `weight`, which an
        # nn.Sequential, as the classifier of a ResNet, does not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NO_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises: feedback is not linear in its weights."""
        raise NotImplementedError(
            "TOAST adapters cannot be combined by `add_weighted_adapter`: the feedback is not linear in the weights. "
            "Switch between adapters with `set_adapter`, or train one on all the data."
        )

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            return nullcontext()
        refuse_fused(self.model, "run a mixed batch")
        paths = [path for _, path in feedback_paths(self.model)]
        return mixed_batch(self.model, paths, adapter_names, args, kwargs)

    # ------------------------------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # it gets configs of ours only
        cls, model: nn.Module, config: TopDownConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        weights = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        note_causality(model, adapter_name, config)
        if config.gate is not None and config.gate_is_causal is None:
            warnings.warn(
                f"The gate of the TOAST adapter {adapter_name!r} was never fitted and is open for all inputs; call "
                "`toast_peft.fit_gate(model, target, reference)`, or leave out `gate`.",
                stacklevel=2,
            )
        # PEFT gives what layers of other methods on the same model have under the same name as well.
        own = {name: tensor for name, tensor in weights.items() if ".topdown_" in name}
        return {name: tensor for name, tensor in own.items() if not is_in_base_feedback(config, name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # it gets configs of ours only
        cls, model: nn.Module, config: TopDownConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        refuse_fused(model, "load other weights", adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        loads: dict[str, Load] = getattr(model.base_model, "_loads", {}) if isinstance(model, PeftModel) else {}
        configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
        # PEFT removes the prefix where the adapter was injected into a model without a `PeftModel` around it.
        prefix = "" if isinstance(model, PeftModel) else SAVED_PREFIX
        loaded = {name.removeprefix(prefix): value for name, value in remapped.items()}
        try:
            check_weights(model, adapter_name, config, loaded)
        except ValueError:
            # The config of another adapter stays, the only one does so too.
            if adapter_name in loads and loads[adapter_name].undo() and len(configs) > 1:
                configs.pop(adapter_name, None)
            raise
        loads.pop(adapter_name, None)
        # What is in the base feedback is in the model already; PEFT would warn that it is missing.
        return remapped | {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if belongs_to(adapter_name, name) and is_in_base_feedback(config, name)
        }


def _own_config(config: TopDownConfig) -> TopDownConfig:
    """The config of one adapter: a copy if the caller's object is that of another one, or is to be used again.

    Else it is that object, as with LoRA. A gate that is fitted, and the end of a start from `pretrained_feedback`,
    change it.
    """
    is_of_another = config.num_blocks is not None and not config.is_of_saved_adapter
    if not is_of_another and config.pretrained_feedback is None:
        return config
    if config.modules_to_save is None and config.task_type in ADDED_BY_PEFT:
        config.modules_to_save = []  # PEFT puts the names into the list of the caller's object, which the copy shares
    own = copy(config)
    if is_of_another:
        own.gate_report = own.gate_is_causal = None
    return own


def _with_base_model_facts(config: TopDownConfig, stacks: Sequence[Stack]) -> TopDownConfig:
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
    for name, value in facts.items():
        setattr(config, name, value)
    return config


def _drop_adapter(model: nn.Module, adapter_name: str) -> None:
    """Drop a TOAST adapter, with all that came with it, for another of the same name."""
    paths = [
        (backbone, path) for backbone, path in feedback_paths(model) if adapter_name in path.selection.topdown_config
    ]
    for backbone, path in paths:
        path.drop_adapter(adapter_name)
        if not path.selection.topdown_config:
            remove_feedback_path(backbone, path)
    if not paths or _is_of_another_method(model, adapter_name):
        return
    wrappers = [(name, part) for name, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper)]
    wrappers = [(name, wrapper) for name, wrapper in wrappers if adapter_name in wrapper._get_available_adapters()]
    for name, wrapper in wrappers:
        wrapper.delete_adapter(adapter_name, [a for a in wrapper.active_adapters if a != adapter_name])
        if not wrapper._get_available_adapters():
            model.set_submodule(name, wrapper.original_module)


def _is_of_another_method(model: nn.Module, adapter_name: str) -> bool:
    """Whether there is one of the same name, of LoRA for example, whose modules to save the model has then."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return any(
        adapter_name in getattr(layer, name, ())
        for layer in layers
        if not isinstance(layer, (TopDownLayer, TrainableTokensLayer))
        for name in layer.adapter_layer_names
    )

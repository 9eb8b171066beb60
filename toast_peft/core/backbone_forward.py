"""Runs a backbone twice.

    input --> pass 1, blocks 0 .. feedback_from - 1 --> features --> feedback path --> td of every block
    input --> pass 2, blocks feedback_to .. L - 1, value projections see h + td --> output

The backbone's own forward is called for both passes, so masks, position embeddings and whatever else the model does
around its blocks stay its own. In pass 1 the blocks from `feedback_from` on hand their input through; in pass 2 the
blocks below `feedback_to` return what pass 1 computed, which is the same. Pass 1 runs without dropout (`dropout.py`);
if there is any, these blocks run again in pass 2.

Where feedback may be left out (`skip_closed_rows`), pass 2 runs for some rows of the batch (`open_rows.py`). With a
key-value cache in which rows have had no feedback yet, pass 1 runs as the base model does, and pass 2 for the others.

What pass 1 computes may also have been stored (`stored_pass.py`). Then it does not run.

The backbone and its blocks get another `forward`, the value projections hooks. Python state says which pass is
running; it is kept per thread and restored when a forward ends, however it ends.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .active_adapters import ActiveAdapter, PathInput, check_together, compute_feedback
from .block_forward import BlockForward
from .cache import (
    CacheOwner,
    TwoPassCache,
    cache_argument,
    cache_parameter,
    is_made_for_compiling,
    refuse_paged_cache,
    refuse_two_pass_cache,
)
from .checkpoint import CheckpointWithFeedback, wrap_checkpoint
from .dropout import has_dropout, pass_without_dropout
from .gate import tokens_for
from .joint_pass import JointPass
from .layers import FeedbackPath, hidden_states_of
from .mixed_batch import has_modules_of_rows
from .module_tree import is_trained
from .open_rows import has_rows, may_skip_rows, put_rows, rows_of_arguments
from .prompt_input import PROMPT_INPUT, GivenPrompt, path_for
from .recording import RecordingPaused, is_recording
from .replaced_forward import ReplacedForward
from .run import SINGLE_PASS, Current, Run, run_of
from .running_sum import RunningSum
from .stored_pass import STORED_INPUT, Origin, StoredPass
from .topdown_layer import weight_of
from .variational_loss import Reconstruction, forget_variational_loss, total

if TYPE_CHECKING:
    from .stack import Stack


class BackboneForward(ReplacedForward):
    """Forward of the backbone: pass 1, feedback, pass 2; or just the one pass if no adapter is active."""

    records_inside: ClassVar[bool] = True  # whether something inside of a block may be recorded

    def __init__(self, stack: "Stack", path: FeedbackPath, block_forwards: list[BlockForward]) -> None:
        parameters = inspect.signature(stack.backbone.forward).parameters
        self.argument_names = tuple(parameters)
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        self.records_itself = isinstance(stack.backbone, PreTrainedModel)
        # What a caller wants to record is recorded in pass 2. Other modules may hand all they take on to their blocks.
        recordings = ("output_hidden_states", "output_attentions")
        self.not_recorded = {
            name: False for name in recordings if name in parameters or (takes_any and self.records_itself)
        }
        super().__init__(stack.backbone, path.state)
        self.blocks = stack.blocks
        self.blocks_name = stack.blocks_name
        self.cache_parameter = cache_parameter(parameters)
        # Other modules may hand a cache on with all that they take.
        self.has_cache = stack.has_cache and (self.cache_parameter is not None or not self.records_itself)
        self.block_forwards = block_forwards
        self.final_norm_name = stack.final_norm
        self.normalize_features = stack.normalize_features
        self.path = path

    @property
    def final_norm(self) -> nn.Module | None:
        """The backbone's final norm as it is now: PEFT wraps it when it is trained as well."""
        return None if self.final_norm_name is None else self.module.get_submodule(self.final_norm_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**{self.argument_names[i]: value for i, value in enumerate(args)}, **kwargs}
        if PROMPT_INPUT in kwargs or STORED_INPUT in kwargs:
            return self._with_inputs_of_model(**kwargs)
        names = self.path.active_adapters
        if torch.is_grad_enabled():
            self.wrap_checkpoints()
        # Also without an adapter: this forward may be called from inside of a pass 2 of the same backbone, and it ends
        # as it began when another thread switches the adapter on.
        outer, self.state.current.run = self.state.current.run, SINGLE_PASS
        try:
            if not names:
                if not self.path.selection.disable_adapters:
                    self.state.current.selected = {}  # that of the last forward with an active adapter was another's
                refuse_two_pass_cache(kwargs)
                return self.original(**kwargs)
            if self.state.current.joint is not None:
                return self._run_jointly(self.state.current.joint, self._new_run(names, kwargs), kwargs)
            return self._run_twice(self._new_run(names, kwargs), kwargs)
        finally:
            self.state.current.run = outer

    def _with_inputs_of_model(
        self, topdown_prompt: torch.Tensor | None = None, topdown_features: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Call with what the model's forward takes, where another one is in its place, as with the trainers of TRL.

        Args:
            topdown_prompt: as in `ModelForward`.
            topdown_features: as in `StoredInput`.
            kwargs: the arguments of the backbone.
        """
        current = self.state.current
        outer = current.prompt, current.stored
        try:
            if topdown_prompt is not None:
                path_for([self.path], topdown_prompt)  # raises if it cannot be for this one
                current.prompt = GivenPrompt(topdown_prompt)
            if topdown_features is not None:
                current.stored = self._stored_pass(topdown_features)
            return self(**kwargs)
        finally:
            current.prompt, current.stored = outer

    def _stored_pass(self, topdown_features: torch.Tensor) -> StoredPass:
        accepted = self.path.passes.stored_input
        if accepted is None:
            raise ValueError(
                f"`{STORED_INPUT}` was given, and this model has stored none; expected those of `store_features` with "
                "this model. Call it first, or leave them out."
            )
        return accepted.stored_pass(topdown_features)

    def wrap_checkpoints(self) -> None:
        """Wrap the checkpointing functions; again at each forward, as enabling checkpointing sets a new one."""
        for block in self.block_forwards:
            wrap_checkpoint(block.module, CheckpointWithFeedback, self.state, block)

    def _run_twice(self, run: Run, kwargs: dict[str, Any]) -> Any:
        name, config, *_ = run.adapters[0]  # the only one, if there is a variational loss
        if self.module.training and config.variational_weight > 0:
            mask = kwargs.get("attention_mask") if config.variational_ignore_padding else None
            run.reconstruction = Reconstruction(self.path, name, mask)
        stored, self.state.current.stored = self.state.current.stored, None
        cache = self._cache(run, kwargs) if stored is None else None
        if stored is not None:
            output = self._run_after_stored_pass(run, kwargs, stored)
        elif cache is not None:
            output = self._run_with_cache(run, kwargs, cache)
        else:
            output = self._run_without_cache(run, kwargs)
        if run.reconstruction is not None:
            self._add_loss(run.reconstruction.loss(config), self.state.current)
        return output

    @staticmethod
    def _add_loss(loss: torch.Tensor | None, current: Current) -> None:
        """To that of other forwards of this backbone within one of the model."""
        if not current.model_runs:
            forget_variational_loss(current)
        losses = [part for part in (current.variational_loss, loss) if part is not None]
        current.variational_loss = total(losses) if losses else None

    def _run_after_stored_pass(self, run: Run, kwargs: dict[str, Any], stored: StoredPass) -> Any:
        for adapter in run.adapters:
            stored.check(self._origin_of(adapter))
        kwargs = self._without_cache(kwargs)
        self._instead_of_first_pass(run, stored, kwargs)
        self._begin_second_pass(run, kwargs, stored)
        return self.original(**kwargs)

    def _run_without_cache(self, run: Run, kwargs: dict[str, Any]) -> Any:
        skips = self._may_skip_rows(run)
        if skips:
            run.kept_below = run.feedback_from
        run.complete = self.state.current.without_second_pass and not self._is_recorded_outside()
        output = self._first_pass(run, kwargs)
        self._begin_second_pass(run, kwargs, skip_closed=skips)
        if run.complete:
            return output
        return self._of_open_rows(run, kwargs) if skips else self.original(**kwargs)

    def _run_with_cache(self, run: Run, kwargs: dict[str, Any], cache: TwoPassCache) -> Any:
        """While a row of the cache has had no feedback, pass 1 is the forward of the base model, with its output."""
        run.complete = skips = cache.is_shared
        output = self._first_pass(run, {**kwargs, **cache.in_first_pass})
        self._begin_second_pass(run, kwargs, skip_closed=skips, running_sums=cache.running_sums)
        if skips:
            output = self._of_open_rows_with_cache(run, kwargs, cache, cache.restore(output))
            if output is not None:
                return output
            cache.part()
        return cache.restore(self.original(**{**kwargs, **cache.in_second_pass}))

    def _of_open_rows_with_cache(self, run: Run, kwargs: dict[str, Any], cache: TwoPassCache, output: Any) -> Any:
        """The output of pass 1 with that of pass 2 for the rows that have had feedback; `None` if all have to run."""
        is_open = self.state.current.open_rows
        assert is_open is not None
        rows, batch_size = cache.rows_with_feedback(is_open), len(is_open)
        if len(rows) == 0:
            return output
        if run.repeat_lower_blocks or not (self._takes_some_rows() and cache.saves_by_rows(len(rows), batch_size)):
            return None
        arguments = rows_of_arguments({**kwargs, cache.name: None}, rows, batch_size)
        if arguments is None or not has_rows(output, batch_size, cache.cache):
            return None
        self.state.current.run = run.of_rows(rows, batch_size)
        return put_rows(output, rows, self.original(**{**arguments, **cache.in_second_pass_of(rows, batch_size)}))

    def _begin_second_pass(
        self,
        run: Run,
        kwargs: dict[str, Any],
        stored: StoredPass | None = None,
        skip_closed: bool = False,
        running_sums: Sequence[RunningSum] = (),
    ) -> None:
        """Compute what pass 2 adds."""
        compute_feedback(self.path, run, self._inputs_of_path(run, kwargs, stored, running_sums), skip_closed)
        current = self.state.current
        if torch.compiler.is_exporting():
            current.selected = {}
        else:
            current.attention_mask = kwargs.get("attention_mask")
        run.first_pass = False
        current.run = run

    def _inputs_of_path(
        self, run: Run, kwargs: dict[str, Any], stored: StoredPass | None, running_sums: Sequence[RunningSum]
    ) -> list[PathInput]:
        """What the feedback of each adapter starts from, computed once where it is the same."""
        found: dict[tuple[Any, ...], PathInput] = {}
        inputs, sums = [], list(running_sums)
        for adapter in run.adapters:
            gate = adapter.config.gate
            kind = (adapter.feedback_from, self._normalizes(adapter), gate)
            if kind not in found:
                features, compared = self._features(run, adapter) if stored is None else (stored.features, None)
                before = sums.pop(0) if sums and gate == "sequence" else None
                tokens = None if gate is None else tokens_for(gate, kwargs, features, before)
                found[kind] = PathInput(features, compared, tokens)
            inputs.append(found[kind])
        return inputs

    def _run_jointly(self, joint: JointPass, run: Run, kwargs: dict[str, Any]) -> Any:
        """Both passes in one: some rows without feedback, the others with that of other features."""
        [adapter] = run.adapters  # has been checked
        run = replace(run, first_pass=False, repeat_lower_blocks=True, keeps_features=True)
        features = joint.features_of_rows()
        if features is not None:
            tokens = joint.tokens_of_rows(features, kwargs) if adapter.config.gate == "sequence" else None
            run.feedback = self.path(features, adapter.name, tokens=tokens)
            self.state.current.attention_mask = kwargs.get("attention_mask")
            added = self.path.in_second_pass(adapter.name)
            run.second_pass = () if added is None else (joint.in_second_rows(added, features),)
        self.state.current.run = run
        output = self.original(**kwargs)
        joint.next_features = self._features(run, adapter)[0][: joint.num_first_rows]
        return output

    def _of_open_rows(self, run: Run, kwargs: dict[str, Any]) -> Any:
        """The output of pass 2, which the rows without feedback have from pass 1."""
        is_open = self.state.current.open_rows
        assert is_open is not None
        rows, batch_size = is_open.nonzero().flatten(), len(is_open)
        arguments = rows_of_arguments(kwargs, rows, batch_size) if self._takes_some_rows() else None
        if len(rows) == batch_size or (len(rows) > 0 and arguments is None):
            return self.original(**kwargs)
        self.state.current.run = run.without_feedback()
        output = self.original(**kwargs)
        if len(rows) == 0:
            return output
        if arguments is None or not has_rows(output, batch_size):
            self.state.current.run = run
            return self.original(**kwargs)
        self.state.current.run = run.of_rows(rows, batch_size)
        return put_rows(output, rows, self.original(**arguments))

    def _new_run(self, names: list[str], kwargs: dict[str, Any]) -> Run:
        adapters = tuple([self._adapter(name) for name in names])
        if len(adapters) > 1:
            check_together(adapters, self.module.training)
        fused = self.path.fused
        if fused is not None:
            fused.check(names, self.module.training)
        recorded = ("output_attentions", "output_router_logits")
        is_random = self.module.training and has_dropout(self.module)
        # What pass 1 has computed without dropout is not what they compute in pass 2.
        runs_again = is_random or (self.records_inside and any(self._option(name, kwargs) for name in recorded))
        return run_of(adapters, runs_again, is_random, of_values=fused is not None and fused.of_values)

    def _adapter(self, name: str) -> ActiveAdapter:
        selection = self.path.selection
        return ActiveAdapter(name, selection.topdown_config[name], *selection.topdown_range[name])

    def _may_skip_rows(self, run: Run) -> bool:
        return run.adapters[0].config.skip_closed_rows and may_skip_rows(run.adapters)

    def _option(self, name: str, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(name)
        return getattr(getattr(self.module, "config", None), name, None) if value is None else value

    def _cache(self, run: Run, kwargs: dict[str, Any]) -> TwoPassCache | None:
        if not self.has_cache:
            return None
        refuse_paged_cache(kwargs)
        name = cache_argument(kwargs, self.cache_parameter)
        if name is None:
            return None
        cache = kwargs.get(name)
        if cache is None:
            checkpointing = self.module.training and getattr(self.module, "gradient_checkpointing", False)
            # One that pass 1 makes itself is its own, and nobody has asked for it.
            is_own = self.state.current.without_second_pass
            if checkpointing or is_own or not self._option("use_cache", kwargs):
                return None
        has_cross_attention = kwargs.get("encoder_hidden_states") is not None
        may_share = self._may_skip_rows(run) and self._may_share(run, cache)
        # Adapters that start from the same features share a running sum.
        summed = {(a.feedback_from, self._normalizes(a)) for a in run.adapters if a.config.gate == "sequence"}
        return TwoPassCache(
            cache,
            name,
            self.module.config,
            len(self.blocks),
            self._cache_owner(run),
            has_cross_attention,
            may_share,
            num_sums=len(summed),
        )

    def _takes_some_rows(self) -> bool:
        """Whether the forward may be called with some rows of the batch."""
        # What another model records would have them twice.
        return self.records_itself and not (self.state.current.row_names and has_modules_of_rows(self.module))

    def _cache_owner(self, run: Run) -> CacheOwner:
        identities = {a.name: self.path.selection.topdown_identity[a.name].id for a in run.adapters}
        of_rows = self.state.current.row_names
        # A name may be that of an adapter of another stack.
        rows = [list(identities)] if of_rows is None else [[name] for name in of_rows.names]
        identity = [tuple(identities[name] for name in names if name in identities) for names in rows]
        same = identity[:1] if len(set(identity)) == 1 else identity
        return CacheOwner(" + ".join(identities), tuple(same), run.feedback_from, run.feedback_to)

    def _may_share(self, run: Run, cache: Cache | None) -> bool:
        """Whether pass 1 may be the forward of the base model with this cache."""
        if self.module.training or self._is_recorded_outside():
            return False
        # On an accelerator `generate` compiles the forwards that follow, and a CUDA graph adds no layers to a cache.
        prompt = self.path.selection.topdown_prompt[run.adapters[0].name]
        return not (is_made_for_compiling(cache) and weight_of(prompt).device.type != "cpu")

    def _is_recorded_outside(self) -> bool:
        """Whether a model around the backbone records what runs in it, which it does not do in pass 1."""
        return is_recording() and not self.records_itself

    def origin(self, adapter_name: str) -> Origin:
        """What pass 1 of an adapter is."""
        return self._origin_of(self._adapter(adapter_name))

    def _origin_of(self, adapter: ActiveAdapter) -> Origin:
        return Origin(adapter.feedback_from, adapter.feedback_to, self._normalizes(adapter))

    def _without_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward whose pass 1 does not run, and so fills no cache."""
        if not self.has_cache:
            return kwargs
        name = cache_argument(kwargs, self.cache_parameter)
        if (name is not None and kwargs.get(name) is not None) or kwargs.get("use_cache"):
            raise ValueError(
                f"`{STORED_INPUT}` was given together with a key-value cache, which would have no keys and values of "
                "pass 1; leave out one of them."
            )
        return {**kwargs, "use_cache": False} if "use_cache" in self.argument_names else kwargs

    def _instead_of_first_pass(self, run: Run, stored: StoredPass, kwargs: dict[str, Any]) -> None:
        """Let pass 2 find what pass 1 had computed when it was stored."""
        if self.features_are_trained(stored.origin, kwargs):
            raise ValueError(
                f"`{STORED_INPUT}` was given, but pass 1 depends on something that is trained or wants a gradient, so "
                "that it is another one in every step; freeze all below the feedback, or leave it out."
            )
        recorded = self._option("output_hidden_states", kwargs)
        if stored.hidden_states is None or is_recording() or not (recorded is None or recorded is False):
            run.repeat_lower_blocks = True
        else:  # only the last of them is used
            run.outputs = dict.fromkeys(range(run.feedback_to), stored.hidden_states)

    def _first_pass(self, run: Run, kwargs: dict[str, Any]) -> Any:
        self.state.current.run = run
        needs_graph = torch.is_grad_enabled() and self._first_pass_is_trained(run.feedback_from, kwargs)
        recording = nullcontext() if self.records_itself else RecordingPaused()
        recorded = {} if run.complete else self.not_recorded
        with nullcontext() if needs_graph else torch.no_grad(), self._without_dropout(run, needs_graph), recording:
            output = self.original(**{**kwargs, **recorded})
        if run.last_output is None:
            raise NotImplementedError(
                f"No block of {self.blocks_name!r} was called by the forward of {type(self.module).__name__}, so the "
                "adapter would have no effect. Name the value projections of the blocks that it does call with "
                "`target_modules`; if these are they, TOAST does not support this model."
            )
        return output

    def _without_dropout(self, run: Run, needs_graph: bool) -> AbstractContextManager[None]:
        return pass_without_dropout(self.module, needs_graph) if run.without_dropout else nullcontext()

    def _first_pass_is_trained(self, feedback_from: int, kwargs: dict[str, Any]) -> bool:
        """Whether the features of pass 1, before a norm, depend on something that wants a gradient."""
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
            return True
        return is_trained(self.module, without={self.path, self.final_norm, *list(self.blocks)[feedback_from:]})

    def features_are_trained(self, origin: Origin, kwargs: dict[str, Any]) -> bool:
        """Whether the features that the feedback starts from depend on something that wants a gradient."""
        norm = self.final_norm if origin.normalize_features else None
        return (norm is not None and is_trained(norm)) or self._first_pass_is_trained(origin.feedback_from, kwargs)

    def _features(self, run: Run, adapter: ActiveAdapter) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the feedback starts from, and what the prompt is compared with if that is something else."""
        features = hidden_states_of(run.output_below(adapter.feedback_from))
        return self._after_final_norm(features) if self._normalizes(adapter) else features, None

    def _after_final_norm(self, features: torch.Tensor) -> torch.Tensor:
        assert self.final_norm is not None  # the config has been checked
        return self.final_norm(features)

    def _normalizes(self, adapter: ActiveAdapter) -> bool:
        wanted = adapter.config.normalize_features
        return self.normalize_features if wanted is None else wanted

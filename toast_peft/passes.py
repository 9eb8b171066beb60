"""Runs a backbone twice.

    input --> pass 1, blocks 0 .. feedback_from - 1 --> features --> feedback path --> td of every block
    input --> pass 2, blocks feedback_to .. L - 1, value projections see h + td --> output

The backbone's own forward is called for both passes, so masks, position embeddings and whatever else the model does
around its blocks stay its own. In pass 1 the blocks from `feedback_from` on hand their input through; in pass 2 the
blocks below `feedback_to` return what pass 1 computed, which is the same.

The backbone and its blocks get another `forward`, the value projections hooks. Python state says which pass is
running; it is kept per thread and restored when a forward ends, however it ends.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from .block_stack import BlockStack
from .cache import TwoPassCache, refuse_two_pass_cache
from .config import TopDownConfig
from .feedback import FeedbackPath, hidden_states_of
from .value_projection import ValueColumns, ValueHooks
from .variational_loss import LossHook, Reconstruction, padding_to_leave_out


@dataclass
class Run:
    """State of one forward of the backbone.

    Args:
        feedback_from: blocks from here on are skipped in pass 1.
        feedback_to: blocks below are skipped in pass 2, unless `repeat_lower_blocks`.
        double_bias: whether the bias of a value projection is added once more (official ViT).
        repeat_lower_blocks: run the blocks below `feedback_to` in pass 2 as well, so that something recorded inside of
            them (attentions) is there.
        first_pass: which pass is running.
        outputs: what the blocks below `feedback_to` returned in pass 1.
        last_output: what the last block that ran in pass 1 returned.
        feedback: for each block index what its value projection adds in pass 2.
        reconstruction: compares inputs of blocks with what `linear1` makes of their outputs, if that is wanted.
        input_sizes: where feedback is a map, for each block or stage the height and width of its input.
        inputs: in a ConvNet, for each stage its input in pass 2, without the feedback.
    """

    feedback_from: int
    feedback_to: int
    double_bias: bool
    repeat_lower_blocks: bool
    first_pass: bool = True
    outputs: dict[int, Any] = field(default_factory=dict)
    last_output: Any = None
    feedback: dict[int, torch.Tensor] = field(default_factory=dict)
    reconstruction: Reconstruction | None = None
    input_sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def features(self) -> torch.Tensor:
        """Hidden states after block `feedback_from - 1`. Shape: [b, n, d]"""
        return hidden_states_of(self.last_output)

    def keep(self, index: int, output: Any) -> None:
        """Keep what pass 2 or the feedback path needs of what a block computed in pass 1."""
        self.last_output = output
        if max(index, 0) < self.feedback_to:  # the stem of a ConvNet, -1, belongs to its stage 0
            self.outputs[index] = output

    def kept(self, index: int, hidden_states: torch.Tensor) -> Any:
        """What a block that pass 2 skips returned in pass 1; its input, if the model left it out there (LayerDrop)."""
        if index in self.outputs:
            return self.outputs[index]
        return self.in_form_of_blocks(hidden_states)

    def part(self, indices: Iterable[int]) -> "Run":
        """What some blocks need to run again, without the tensors of the others."""
        indices = list(indices)
        kept, feedback = ({i: values[i] for i in indices if i in values} for values in (self.outputs, self.feedback))
        return replace(self, outputs=kept, feedback=feedback, reconstruction=None, inputs={})

    def in_form_of_blocks(self, hidden_states: torch.Tensor) -> Any:
        """Hidden states as a block of this model returns them."""
        return (hidden_states, *self.last_output[1:]) if isinstance(self.last_output, tuple) else hidden_states


# A forward without feedback, as a checkpointed block of it runs again.
SINGLE_PASS = Run(0, 0, double_bias=False, repeat_lower_blocks=True, first_pass=False)


class ThreadState(threading.local):
    """The running forward, each thread its own; copies start empty.

    `variational_loss` is that of the last forward in training, until it is added to a loss.
    """

    def __init__(self) -> None:
        # On the instance: a default of the class would appear there at the first forward, and a compiled forward
        # would not recognise the state that it was traced with.
        self.run: Run | None = None
        self.variational_loss: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "ThreadState":
        return ThreadState()

    def __reduce__(self) -> tuple:
        return ThreadState, ()


class ReplacedForward:
    """A module's `forward` on the instance, in front of the one of its class.

    An object instead of a closure, so that a deep copy of the model is bound to the copied modules.
    """

    def __init__(self, module: nn.Module, state: ThreadState) -> None:
        self.module = module
        self.state = state
        # Another library may have replaced the forward of this instance already (accelerate does, for offloading).
        self.previous: Callable | None = module.__dict__.get("forward")
        module.forward = self

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.previous or type(self.module).forward)
        if self.previous is not None:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # Looked up now: FSDP2 changes the class of the module.
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put the previous forward back, also from beneath a later replacement by accelerate."""
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) is self:
                if self.previous is not None:
                    attributes[name] = self.previous
                elif name == "forward":
                    del attributes[name]
                else:
                    attributes[name] = type(self.module).forward.__get__(self.module)


class CheckpointWithFeedback:
    """A gradient checkpointing function that hands the feedback to the checkpointed call as tensor arguments.

    The blocks run again in the backward pass, when the forward is over and perhaps another one has begun. As an
    argument the feedback is there again, and it gets its gradient also from reentrant checkpointing.

    Args:
        checkpoint: the function that transformers has set.
        state: has the running forward.
        blocks: the block that a checkpointed call runs, or all of a stage where the model checkpoints stages.
    """

    def __init__(self, checkpoint: Callable, state: ThreadState, *blocks: "BlockForward") -> None:
        self.checkpoint = checkpoint
        self.state = state
        self.blocks = blocks

    def __call__(self, function: Callable, *args: Any) -> Any:
        run = self.state.run
        if not torch.is_grad_enabled():  # pass 1 of a frozen model: nothing to recompute
            return function(*args)
        if run is not None and all(block.is_skipped(run) for block in self.blocks):
            return function(*args)
        if torch.compiler.is_compiling():  # the function is traced once and not run again; it may not change the state
            output = self.checkpoint(function, *args)
        else:
            again = SINGLE_PASS if run is None else run.part(block.index for block in self.blocks)
            call = functools.partial(self.run, function, again)
            output = self.checkpoint(call, *again.feedback.values(), *args)
        if run is not None:
            self.note(run, args[0], output)
        return output

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Note the output with its graph, which the inside of a reentrant checkpoint has not."""
        [block] = self.blocks
        block.note(run, hidden_states, output)

    def run(self, function: Callable, run: Run, *args: Any) -> Any:
        """The checkpointed call, in the forward and again in the backward pass, where it may be another thread."""
        feedback = dict(zip(run.feedback, args, strict=False))
        previous, self.state.run = self.state.run, replace(run, feedback=feedback)
        try:
            return function(*args[len(feedback) :])
        finally:
            self.state.run = previous


def wrap_checkpoint(module: nn.Module, wrapper: type, state: ThreadState, *blocks: "BlockForward") -> None:
    """Put a `wrapper` around the module's gradient checkpointing function, if it has one."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is not None and not isinstance(checkpoint, wrapper):
        module._gradient_checkpointing_func = wrapper(checkpoint, state, *blocks)


def unwrap_checkpoint(module: nn.Module) -> None:
    """Put back what `wrap_checkpoint` has wrapped."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, CheckpointWithFeedback):
        module._gradient_checkpointing_func = checkpoint.checkpoint


class BlockForward(ReplacedForward):
    """Forward of a block: skips it where a pass does not need it, and gives it its feedback in pass 2."""

    def __init__(self, module: nn.Module, state: ThreadState, index: int, path: FeedbackPath) -> None:
        super().__init__(module, state)
        self.index = index
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.state.run
        if run is None:
            self._check_that_no_feedback_is_missing()
            return self.original(*args, **kwargs)
        if run.first_pass:
            return self._first_pass(run, *args, **kwargs)
        if self.is_skipped(run):
            return run.kept(self.index, *args[:1])
        return self._second_pass(run, *args, **kwargs)

    def is_skipped(self, run: Run) -> bool:
        """Whether the running pass does not need this block."""
        if run.first_pass:
            return self.index >= run.feedback_from and run.last_output is not None  # unless LayerDrop left out all
        return self.index < run.feedback_to and not run.repeat_lower_blocks

    def _check_that_no_feedback_is_missing(self) -> None:
        if self.path.active_adapter is not None:
            raise RuntimeError(
                f"Block {self.index} was called past the forward of the module that owns the blocks, so it would not "
                "get the feedback of the active adapter. Call the whole model, or disable the adapter to run single "
                "blocks. If the model itself does this, TOAST does not support it."
            )

    def _first_pass(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        if self.is_skipped(run):
            # Unchanged hidden states in the form a block of this model returns them.
            return run.last_output
        output = self.original(*args, **kwargs)
        run.keep(self.index, output)
        return output

    def _second_pass(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        self.reconstruct(run, args[0] if args else kwargs["hidden_states"], output)
        return output

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Keep what comes later needs of what the block has computed in the running pass."""
        if run.first_pass:
            run.keep(self.index, output)
        else:
            self.reconstruct(run, hidden_states, output)

    def reconstruct(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Add this block's part to the variational loss, where that is wanted."""
        if run.reconstruction is not None and self.index in run.feedback:
            run.reconstruction.add(self.index, hidden_states, output)

    def remove(self) -> None:
        super().remove()
        unwrap_checkpoint(self.module)


class BackboneForward(ReplacedForward):
    """Forward of the backbone: pass 1, feedback, pass 2; or just the one pass if no adapter is active."""

    def __init__(
        self, stack: BlockStack, path: FeedbackPath, state: ThreadState, block_forwards: list[BlockForward]
    ) -> None:
        parameters = inspect.signature(stack.backbone.forward).parameters
        self.argument_names = tuple(parameters)
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        # What a caller wants to record is recorded in pass 2.
        recordings = ("output_hidden_states", "output_attentions")
        self.not_recorded = {name: False for name in recordings if takes_any or name in parameters}
        super().__init__(stack.backbone, state)
        self.blocks = stack.blocks
        self.has_cache = stack.has_cache and "past_key_values" in parameters
        self.block_forwards = block_forwards
        self.final_norm_name = stack.final_norm
        self.normalize_features = stack.normalize_features
        self.path = path

    @property
    def final_norm(self) -> nn.Module | None:
        """The backbone's final norm as it is now: PEFT wraps it when it is trained as well."""
        return None if self.final_norm_name is None else self.module.get_submodule(self.final_norm_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(self.argument_names, args, strict=False)) | kwargs
        adapter_name = self.path.active_adapter
        self.wrap_checkpoints()
        # Also without an adapter: this forward may be called from inside of a pass 2 of the same backbone.
        outer, self.state.run = self.state.run, None
        try:
            if adapter_name is None:
                refuse_two_pass_cache(kwargs.get("past_key_values"))
                return self.original(**kwargs)
            return self._run_twice(adapter_name, kwargs)
        finally:
            self.state.run = outer

    def wrap_checkpoints(self) -> None:
        """Wrap the checkpointing functions; again at each forward, as enabling checkpointing sets a new one."""
        for block in self.block_forwards:
            wrap_checkpoint(block.module, CheckpointWithFeedback, self.state, block)

    def _run_twice(self, adapter_name: str, kwargs: dict[str, Any]) -> Any:
        config = self.path.selection.topdown_config[adapter_name]
        run = self._new_run(config, kwargs)
        if self.module.training and config.variational_weight > 0:
            run.reconstruction = Reconstruction(self.path, adapter_name, padding_to_leave_out(config, kwargs))
        cache = self._cache(adapter_name, run, kwargs)
        self._first_pass(run, kwargs if cache is None else kwargs | {"past_key_values": cache.first_pass})
        if run.last_output is None:  # LayerDrop left out every block: there is nothing to start the feedback from
            run.repeat_lower_blocks = True
        else:
            self.path.selection.last_mask.start(kwargs.get("attention_mask"))
            run.feedback = self._feedback(run, config, adapter_name)
        run.first_pass = False
        self.state.run = run
        if cache is None:
            output = self.original(**kwargs)
        else:
            output = cache.restore(self.original(**kwargs | {"past_key_values": cache.second_pass}))
        if run.reconstruction is not None:  # added, as a model may call its backbone more than once
            self.state.variational_loss = run.reconstruction.loss(config, self.state.variational_loss)
        return output

    def _new_run(self, config: TopDownConfig, kwargs: dict[str, Any]) -> Run:
        feedback_from, feedback_to = config.feedback_range(len(self.blocks))
        recorded = ("output_attentions", "output_router_logits")
        return Run(
            feedback_from,
            feedback_to,
            config.double_value_bias,
            repeat_lower_blocks=any(self._option(name, kwargs) for name in recorded),
        )

    def _option(self, name: str, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(name)
        return getattr(getattr(self.module, "config", None), name, None) if value is None else value

    def _cache(self, adapter_name: str, run: Run, kwargs: dict[str, Any]) -> TwoPassCache | None:
        if kwargs.get("cache") is not None:  # both passes would write to the same pages
            raise NotImplementedError(
                "TOAST does not run in continuous batching (`generate_batch`), whose paged cache is made for one "
                "pass. Use `generate`, or disable the adapter."
            )
        if not self.has_cache:
            return None
        cache = kwargs.get("past_key_values")
        if cache is None:
            checkpointing = self.module.training and getattr(self.module, "gradient_checkpointing", False)
            if checkpointing or not self._option("use_cache", kwargs):
                return None
        key = (adapter_name, run.feedback_from, run.feedback_to)
        has_cross_attention = kwargs.get("encoder_hidden_states") is not None
        return TwoPassCache(cache, self.module.config, len(self.blocks), key, has_cross_attention)

    def _first_pass(self, run: Run, kwargs: dict[str, Any]) -> None:
        self.state.run = run
        needs_graph = torch.is_grad_enabled() and self._first_pass_is_trained(run, kwargs)
        with nullcontext() if needs_graph else torch.no_grad():
            self.original(**kwargs | self.not_recorded)

    def _first_pass_is_trained(self, run: Run, kwargs: dict[str, Any]) -> bool:
        """Whether the features of pass 1 depend on something that wants a gradient."""
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
            return True
        unused = {self.path, self.final_norm, *self.blocks[run.feedback_from :]}
        return any(parameter.requires_grad for parameter in _parameters_outside(self.module, unused))

    def _feedback(self, run: Run, config: TopDownConfig, adapter_name: str) -> dict[int, torch.Tensor]:
        return self.path(self._features(run, config), adapter_name)

    def _features(self, run: Run, config: TopDownConfig) -> torch.Tensor:
        normalize = self.normalize_features if config.normalize_features is None else config.normalize_features
        return self.final_norm(run.features) if normalize else run.features


def _parameters_outside(module: nn.Module, excluded: set[nn.Module | None]) -> Any:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in excluded:
            yield from _parameters_outside(child, excluded)


class TwoPasses:
    """The replaced forwards and the hooks of one backbone.

    Args:
        stack: the backbone and its blocks.
        path: computes the feedback.
    """

    block_forward_class: ClassVar = BlockForward
    backbone_forward_class: ClassVar = BackboneForward
    loss_hook: LossHook | None = None

    def __init__(self, stack: BlockStack, path: FeedbackPath) -> None:
        self.state = ThreadState()
        self.block_forwards = [
            self.block_forward_class(module, self.state, index, path) for index, module in self.numbered_modules(stack)
        ]
        self.backbone_forward = self.backbone_forward_class(stack, path, self.state, self.block_forwards)
        self.value_hooks: dict[int, ValueHooks] = {}

    def numbered_modules(self, stack: BlockStack) -> Iterable[tuple[int, nn.Module]]:
        """The modules that a pass can skip."""
        return enumerate(stack.blocks)

    def add_loss_hook(self, model: nn.Module) -> None:
        """Let `model` add the variational loss to the loss it returns."""
        self.loss_hook = LossHook(model, self.state, self.backbone_forward.path)

    def add_value_projection(self, index: int, value_projection: nn.Module, columns: ValueColumns | None) -> None:
        """Let the value projection of a block receive feedback."""
        if index not in self.value_hooks:
            self.value_hooks[index] = ValueHooks(value_projection, columns, self.state, index)

    def remove(self) -> None:
        """Leave the modules as they were."""
        for part in (self.backbone_forward, *self.block_forwards, *self.value_hooks.values()):
            part.remove()
        if self.loss_hook is not None:
            self.loss_hook.remove()

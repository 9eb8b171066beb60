"""Initialises feedback from data, in place of a random prompt and identities.

A random prompt is nearly orthogonal to every token, so the mask is near zero and little feedback gets through. The
mean of the normalised features is similar to most tokens. And the variational loss of pre-tuning, by which the chain
learns to compute the input of each block from its output, is a least-squares problem for each block.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .collecting import collect
from .config import TopDownConfig
from .core.fused_feedback import refuse_fused
from .core.layers import FeedbackPath, check_is_active, hidden_states_of, paths_with
from .core.padding import own_tokens
from .core.topdown_layer import weight_of
from .gate_fitting import Batches, Reference, fit_gate

# Root mean square of the entries of a prompt that starts at features. It sets how far a step turns the prompt: Adam
# moves each entry by up to the learning rate. After 50 steps with 1e-2, a LLaMA of 3 M parameters had 0 % of its
# tokens open from a random prompt (0.02), 37 % from one of length 1 (0.07), 88 % from 0.3 and 99 % from 1. With 3e-3
# and less the last three learn alike.
_SIZE_OF_ENTRIES = 0.3


class Statistics:
    """Sums over tokens, collected from forwards while hooks on a backbone and its blocks are set.

    Args:
        backbone: the module with the feedback path.
        path: its feedback path.
        adapter_name: the adapter to initialise; it must be active.
        with_chain: whether to collect what the chain is computed of, or only the mean feature.
    """

    def __init__(self, backbone: nn.Module, path: FeedbackPath, adapter_name: str, with_chain: bool = True) -> None:
        self.backbone = backbone
        self.path = path
        self.adapter_name = adapter_name
        # A chain of full matrices that starts from identities; not one that already is what it should be, or fixed.
        has_chain = self.path.keeps_shape and self.config.r == 0 and self.config.init_weights
        has_chain = has_chain and with_chain
        self.blocks = self.path.blocks_of(adapter_name) if has_chain else []
        self.num_tokens = 0
        self.mean_feature = torch.zeros(())  # [d], not divided by the number of tokens
        self.grams = dict.fromkeys(self.blocks, torch.zeros(()))  # output' output, [d, d]
        self.differences = dict.fromkeys(self.blocks, torch.zeros(()))  # output' (input - output), [d, d]
        # Input and output in pass 1 of this forward, None when it is over.
        self.of_blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.attention_mask: Any = None

    @property
    def config(self) -> TopDownConfig:
        return self.path.selection.topdown_config[self.adapter_name]

    @property
    def prompt(self) -> nn.Parameter:
        """The prompt of the adapter. Shape: [d]"""
        return weight_of(self.path.selection.topdown_prompt[self.adapter_name])

    def hooks(self) -> Iterator[Any]:
        """Set the hooks."""
        yield self.backbone.register_forward_pre_hook(self.start, with_kwargs=True)
        yield self.path.register_forward_pre_hook(self.add)
        for index in self.blocks:
            block = self.path.passes.block_forwards[index].module
            yield block.register_forward_hook(partial(self.keep, index), with_kwargs=True)

    def start(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook: what the backbone gets. Its attention mask is that of its own tokens, also in a decoder."""
        self.attention_mask = attention_mask_of(self.path, args, kwargs)
        self.of_blocks = {}

    def keep(self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A hook: input and output of a block in pass 1."""
        if self.of_blocks is None or index not in self.grams:
            return
        if index in self.of_blocks:  # It runs several times (ALBERT), and its linear1 undoes all of them at once.
            del self.grams[index], self.differences[index], self.of_blocks[index]
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.of_blocks[index] = hidden_states, hidden_states_of(output)

    def add(self, path: FeedbackPath, args: tuple) -> None:
        """A hook: the features, after pass 1."""
        features, _, compared, _ = args
        compared = self._tokens(features if compared is None else compared)
        self.num_tokens += len(compared)
        self.mean_feature = self.mean_feature + F.normalize(compared, dim=-1).sum(0)
        for index, of_block in (self.of_blocks or {}).items():
            hidden_states, output = map(self._tokens, of_block)
            self.grams[index] = self.grams[index] + output.T @ output
            self.differences[index] = self.differences[index] + output.T @ (hidden_states - output)
        self.of_blocks = None

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens but padding. Shape: [b, ..., d] -> [tokens, d]"""
        own = own_tokens(self.attention_mask, x.shape[:-1])
        if own is not None:
            x = x.flatten(1, -2)[own.to(x.device)]
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS does not have
        return x.reshape(-1, x.shape[-1]).to(exact)

    def check(self) -> None:
        """Raise a ValueError if no weights follow from what was collected."""
        if self.num_tokens == 0:
            raise ValueError("The dataloader gave no tokens; expected at least one batch that has some.")
        sums = (self.mean_feature, *self.grams.values(), *self.differences.values())
        if not all(total.isfinite().all() for total in sums):
            raise ValueError(
                "The hidden states of the data are NaN or infinite; expected finite ones. Look for NaN in the "
                "batches, or run the model in another dtype; the adapter is unchanged."
            )
        if not all(total.any() for total in (self.mean_feature, *self.grams.values())):
            raise ValueError("The hidden states of the data are all zero; the adapter is unchanged.")

    def new_prompt(self) -> torch.Tensor:
        """The mean normalised feature, made as long as a prompt is to be. Shape: [d]"""
        direction = F.normalize(self.mean_feature, dim=0)
        return _SIZE_OF_ENTRIES * math.sqrt(len(direction)) * direction

    def new_weights(self, ridge: float) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The prompt and the matrices of the chain, each with its new values. Shapes: [d], [d, d]

        With a ridge towards the identity, which in a residual block is not far away, `linear1' - 1` solves
        `(output' output + ridge) (linear1' - 1) = output' (input - output)`.
        """
        weights = [(self.prompt, self.new_prompt())]
        for index, gram in self.grams.items():
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            regular = gram + ridge * gram.diagonal().mean() * identity
            linear1 = identity + torch.linalg.solve(regular, self.differences[index]).T
            weights.append((weight_of(self.path.layer(str(index)).topdown_linear1[self.adapter_name]), linear1))
        return weights


@torch.no_grad()
def initialize_feedback(
    model: PeftModel | nn.Module,
    dataloader: Batches,
    adapter_name: str = "default",
    ridge: float = 1e-3,
    reference: Reference | None = None,
) -> None:
    """Initialise the feedback of an adapter from some batches of data, as PEFT's EVA does for LoRA.

    The prompt becomes the mean of the normalised features, up to its length. Each `linear1` becomes the matrix that
    computes the input of its block from the output with the least squared error: the minimum of the variational loss
    of pre-tuning on this data, but for the ridge. `linear2` stays: after `init_weights=True` it is zero and the
    adapter still an exact no-op.

    Only the prompt is set for TOAST-Lite, ConvNets and hierarchical transformers, and for adapters that do not start
    from identities (`init_weights=False`, `pretrained_feedback`); so for blocks that run several times in a pass.

    A progress bar shows how far it is; `transformers.utils.logging.disable_progress_bar()` switches it off.

    Args:
        model: has the adapter, which must be active.
        dataloader: gives inputs of the model as dicts; tokens with `attention_mask` 0 are left out.
        adapter_name: the adapter.
        ridge: how much each `linear1` is held at the identity, relative to the mean square of the block's output.
        reference: what the adapter is to leave alone: its gate is then fitted as well, by `fit_gate` with the data of
            `dataloader` as the target. Default: no gate is fitted.

    Raises:
        ValueError: if the model has no such active adapter or its feedback is fused, if the dataloader gives no dicts
            or no tokens, or if the hidden states are not finite or all zero. The adapter is unchanged then.

    Example:

    ```py
    >>> model = get_peft_model(base, TopDownConfig(modules_to_save=["classifier"]))
    >>> toast_peft.initialize_feedback(model, DataLoader(train_set.select(range(512)), batch_size=32))
    ```
    """
    backbones = paths_with(model, adapter_name)
    check_is_active(model, adapter_name)
    refuse_fused(model, "initialise it")
    if reference is not None and iter(dataloader) is dataloader:
        raise ValueError("`dataloader` can be read once, and with a `reference` is read twice; expected a list.")
    statistics = [Statistics(backbone, path, adapter_name) for backbone, path in backbones]
    collect(model, logging.tqdm(dataloader, desc="Looking at the data"), statistics)
    for collected in statistics:
        collected.check()
    weights = [pair for collected in statistics for pair in collected.new_weights(ridge)]
    if reference is not None:  # after all else that may fail, as it fits the gate or leaves it as it was
        fit_gate(model, dataloader, reference, adapter_name)
    for parameter, values in weights:
        parameter.copy_(values)


def attention_mask_of(path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The attention mask among the arguments of a backbone, in whichever form it gets it."""
    names = path.passes.backbone_forward.argument_names
    return (dict(zip(names, args, strict=False)) | kwargs).get("attention_mask")

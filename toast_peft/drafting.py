"""Faster generation: pass 1 of the next token beside pass 2 of this one.

TOAST runs the model twice for each new token, and both are short of work on a GPU: a batch of two rows takes hardly
longer than one row. Pass 1 of the next token can run beside pass 2 of this one if the next token is guessed, and the
base model, which is pass 1, guesses it for free (with sampling by the same random numbers):

    row 1, pass 1:   token t + 1, as drafted    -->  its features, and the draft of token t + 2
    row 2, pass 2:   token t, with feedback     -->  token t + 1

If pass 2 chooses another token than was drafted, the step is run again with that one. So a token costs one forward of
two rows where the draft holds, and two where it does not; what is generated does not depend on the drafts.

The rows are one token apart. The second one begins with a column that is masked, so that both write to the same column
of the key-value cache.

Notation used for tensor shapes:
    - n: number of tokens
    - d: hidden size
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .core.cache import cache_argument, cache_parameter
from .core.joint_pass import JointPass
from .core.layers import FeedbackPath, feedback_paths


def draft_with_first_pass(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Generate with both passes side by side: `model.generate(..., custom_generate=draft_with_first_pass)`.

    Greedily it gives the tokens that `generate` gives without it, and with sampling the same ones for the same seed.
    Of the options of `generate` it takes logits processors, stopping criteria and a static cache, with which
    transformers compiles the model on a GPU. It hands a `streamer` to no `custom_generate`.

    Args:
        model: a decoder with a TOAST adapter active; `generate` fills this in, and what follows.
        input_ids: the prompt. Shape: [1, n]
        logits_processor: for the logits of pass 2.
        stopping_criteria: when to stop.
        generation_config: the options of `generate`.
        model_kwargs: further arguments of the model's forward, for the prompt.

    Returns:
        The prompt and the generated tokens. Shape: [1, n + number of generated tokens]

    Raises:
        ValueError: for more than one sequence, or options of `generate` that it does not take.
        NotImplementedError: if the model's two passes cannot run side by side.
    """
    _check_options(input_ids, generation_config)
    passes = SideBySide(model, generation_config, model_kwargs)
    logits, draft = passes.read_prompt(input_ids), None
    noise = _noise(logits, generation_config)
    while True:
        token = _choose(logits_processor(input_ids, logits), noise)
        input_ids = cast(torch.LongTensor, torch.cat([input_ids, token], dim=-1))
        if bool(stopping_criteria(input_ids, None).all()):
            return input_ids
        if draft is None or not torch.equal(token, draft):
            passes.step_again(token)
        noise = _noise(logits, generation_config)  # the same for a draft and what is chosen in its place
        draft = _choose(logits_processor(input_ids, passes.draft_logits), noise)
        logits = passes.step(draft)


class SideBySide:
    """Both passes of one sequence, pass 2 always one token behind pass 1.

    Args:
        model: the model.
        generation_config: the options of `generate`.
        model_kwargs: further arguments of the model's forward, for the prompt.

    Raises:
        ValueError: if the cache is one that has been used.
        NotImplementedError: if the model's two passes cannot run side by side.
    """

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> None:
        self.path = _feedback_path(model)
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = cache_parameter(parameters) or "past_key_values"
        given = model_kwargs.pop(cache_argument(model_kwargs, self.cache_name) or self.cache_name, None)
        _check_model(model, self.path, parameters, given)
        self.model = cast(Any, model)  # has all of `GenerationMixin` as well
        self.for_prompt = model_kwargs
        compiles = self.model._valid_auto_compile_criteria({self.cache_name: given}, generation_config)
        self.forward = self.model.get_compiled_call(generation_config.compile_config) if compiles else self.model
        self.max_length = generation_config.max_length + 1  # with the column that makes up for the one token
        self.cache: Cache = DynamicCache()
        if isinstance(given, StaticCache):
            self.cache = StaticCache(config=model.config, max_cache_len=self.max_length)

    def read_prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run both passes of the prompt, one after the other.

        Args:
            input_ids: the prompt. Shape: [1, n]

        Returns:
            Logits of the next token. Shape: [1, vocabulary]
        """
        kwargs, caches = self.for_prompt, (DynamicCache(), DynamicCache())
        inputs = self.model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        first = JointPass(1, None)
        self._run(self.model, first, **{**inputs, self.cache_name: caches[0]})
        if first.next_features is None:
            raise _not_supported(self.model, "has its adapter on another module than the one that generates")
        second = JointPass(0, first.next_features)
        logits = self._run(self.model, second, **{**inputs, self.cache_name: caches[1]})
        # In the second row a column before all others, and in the first one after them for `step_again` to take back.
        for index, (of_first, of_second) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
            keys, values = (
                torch.cat(
                    [F.pad(getattr(of_first, name), (0, 0, 0, 1)), F.pad(getattr(of_second, name), (0, 0, 1, 0))]
                )
                for name in ("keys", "values")
            )
            self.cache.update(keys, values, index)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        mask = F.pad(mask, (0, self.max_length - mask.shape[1]), value=1)
        self.attention_mask = torch.cat([mask, F.pad(mask[:, :-1], (1, 0))])
        self.num_columns = input_ids.shape[1] + 1
        positions = inputs.get("position_ids", mask.cumsum(-1) - 1)[..., : input_ids.shape[1]]
        if positions.dim() != 2:
            raise _not_supported(self.model, f"gives each token {len(positions)} positions")
        self.position = positions[:, -1:]
        # With the strides that those of a step have, or a compiled forward would be compiled twice.
        self.features = first.next_features[:, -1:].clone(memory_format=torch.contiguous_format)
        sums = None if second.sums is None else F.pad(second.sums, (0, 0, 1, 0))[:, -2:-1]
        self.sums_before = None if sums is None else sums.clone(memory_format=torch.contiguous_format)
        self.token = input_ids[:, -1:]
        return logits[:, -1].float()

    def step_again(self, token: torch.Tensor) -> None:
        """Run the last step again, with this as the token of pass 1. Shape: [1, 1]"""
        for layer in cast(list[Any], self.cache.layers):
            if isinstance(layer, StaticLayer):  # which cannot be cropped in transformers 5.20
                layer.cumulative_length.sub_(1)
            else:
                layer.crop(-1)
        self.num_columns -= 1
        self._step(token)

    def step(self, draft: torch.Tensor) -> torch.Tensor:
        """Pass 2 of the token of which pass 1 has run, and pass 1 of what is drafted after it.

        Args:
            draft: the drafted token. Shape: [1, 1]

        Returns:
            Logits of pass 2, of what is to be chosen in the place of the draft. Shape: [1, vocabulary]
        """
        self.position = self.position + 1
        self.token, self.features, self.sums_before = self.next_token, self.next_features, self.next_sums
        self._step(draft)
        return self.logits[1:]

    @property
    def draft_logits(self) -> torch.Tensor:
        """Those of the base model, of the token after the last one of pass 1. Shape: [1, vocabulary]"""
        return self.logits[:1]

    def _step(self, token: torch.Tensor) -> None:
        self.num_columns += 1
        is_static = isinstance(self.cache, StaticCache)
        joint = JointPass(1, self.features, self.sums_before)
        logits = self._run(
            self.forward,
            joint,
            input_ids=torch.cat([token, self.token]),
            position_ids=torch.cat([self.position + 1, self.position]),
            attention_mask=self.attention_mask if is_static else self.attention_mask[:, : self.num_columns],
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        assert joint.next_features is not None
        # Of a compiled forward the outputs are overwritten by the next one.
        self.logits, self.next_token = logits[:, -1].to(torch.float32, copy=True), token
        self.next_features = joint.next_features.clone()
        self.next_sums = None if joint.sums is None else joint.sums.clone()

    def _run(self, forward: Callable[..., Any], joint: JointPass, **kwargs: Any) -> torch.Tensor:
        current = self.path.state.current
        current.joint = joint
        try:
            return forward(**kwargs, return_dict=True).logits
        finally:
            current.joint = None


def _noise(logits: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor | None:
    """What makes the choice of a token random, if it is to be. Shape: [1, vocabulary]"""
    return torch.empty_like(logits).exponential_() if generation_config.do_sample else None


def _choose(scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """The most likely token, or one drawn as `torch.multinomial` does. Shape: [1, vocabulary] -> [1, 1]"""
    return (scores if noise is None else scores.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)


def _check_options(input_ids: torch.Tensor, generation_config: GenerationConfig) -> None:
    if len(input_ids) != 1 or generation_config.num_beams != 1:
        raise ValueError(
            f"`draft_with_first_pass` got {len(input_ids)} sequences and num_beams={generation_config.num_beams}; "
            "expected one sequence and no beam search, as the drafts of several would hold at different steps. Leave "
            "out `custom_generate`."
        )
    if generation_config.return_dict_in_generate:
        raise ValueError(
            "`draft_with_first_pass` returns the tokens only, and return_dict_in_generate=True asks for more; leave "
            "one of them out."
        )


def _feedback_path(model: PreTrainedModel) -> FeedbackPath:
    paths = [path for _, path in feedback_paths(model) if path.active_adapter is not None]
    if len(paths) != 1:
        raise ValueError(
            f"`draft_with_first_pass` found {len(paths)} backbones with an active TOAST adapter; expected one. "
            "Without an adapter, leave out `custom_generate`."
        )
    return paths[0]


def _check_model(
    model: PreTrainedModel, path: FeedbackPath, parameters: Mapping[str, inspect.Parameter], given: Cache | None
) -> None:
    layers = [*DynamicCache(config=model.config).layers, *getattr(given, "layers", [])]
    other = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}
    config = path.selection.topdown_config[str(path.active_adapter)]
    reasons = {
        "is an encoder-decoder": model.config.is_encoder_decoder,
        "does not take `position_ids`": "position_ids" not in parameters,
        f"has a cache of {', '.join(sorted(kind.__name__ for kind in other))}": other,
        "adds biases twice in pass 2 (`double_value_bias`)": config.double_value_bias,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _not_supported(model, reason)
    if given is not None and (type(given) not in (DynamicCache, StaticCache) or int(given.get_seq_length()) > 0):
        raise ValueError(
            f"`draft_with_first_pass` got a {type(given).__name__} with {int(given.get_seq_length())} tokens in it; "
            "expected a new DynamicCache or StaticCache, as it has keys and values of another form."
        )


def _not_supported(model: PreTrainedModel, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"`draft_with_first_pass` does not support {type(model).__name__}, which {reason}; leave out "
        "`custom_generate`."
    )

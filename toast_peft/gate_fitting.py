"""Fits the gate of an adapter in closed form: which inputs the adapter is for, and which it is to leave alone.

    direction = normalise(mean of y over the target - mean of y over the reference)
                with several domains in the reference: normalise((C + mean(diag C))^-1 (that difference)), where C is
                the mean of the covariances of target and reference
    threshold = the 0.99 quantile of cos(y, direction) over a domain of the reference, the largest of them
    width     = max(median of cos(y, direction) over the target - threshold, 0.3 times its standard deviation over the
                reference)

The covariance is shrunk half-way to a multiple of the identity: what a few rows say about it holds for these rows, and
a gate that trusts it is closed for them and not for others of their domain (docs/gates.md has the measurement).

What y is, and what the gate does, is in `core/gate.py`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - k: number of tokens of a domain, or of rows if the gate looks at whole rows
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .collecting import collect
from .config import TopDownConfig
from .core.dropout import in_evaluation_mode
from .core.gate import Gate, Tokens
from .core.layers import FeedbackPath, feedback_paths

Batches = Iterable[dict[str, Any]]
Reference = Batches | Mapping[str, Batches] | Literal["generate"]
Kind = Literal["sequence", "token"]

_RIDGE = 1.0  # relative to the mean variance of a channel
_NARROW = 0.3  # a width that the reference itself spans would never open for a target that is near
_QUANTILE = 0.99
_GENERATED = (64, 128)  # rows and tokens of what the base model writes as a reference
_ROUNDING = 1e-6  # of a cosine: what lies on the threshold is closed
_NARROWEST = 1e-6  # of a reference whose features are all the same
_DISTURBED = 1e-3  # relative to the largest entry: more than rounding, far less than what a token changes


class Fit(NamedTuple):
    """A gate, and how well it separates.

    Args:
        direction: Shape: [d]
        threshold: a cosine.
        width: a difference of cosines.
        report: `auc`, and the shares of open tokens.
    """

    direction: torch.Tensor
    threshold: float
    width: float
    report: dict[str, float]


class Compared:
    """What a gate compares with its direction, collected from forwards.

    Args:
        path: the feedback path.
        adapter_name: its adapter, which has a gate.
    """

    def __init__(self, path: FeedbackPath, adapter_name: str) -> None:
        self.path = path
        self.gate = cast(Gate, path.selection.topdown_gate[adapter_name])
        self.found: list[torch.Tensor] = []

    def hooks(self) -> Iterator[Any]:
        """Set the hook."""
        yield self.path.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook: the features, after pass 1."""
        features, _, compared, _ = args
        tokens: Tokens = kwargs["tokens"]
        y = self.gate.compared(features if compared is None else compared, tokens)
        if tokens.own is not None and tokens.own.shape == y.shape[:2]:
            y = y[tokens.own]
        self.found.append(F.normalize(y.reshape(-1, y.shape[-1]), dim=-1).cpu())

    def take(self, domain: str) -> torch.Tensor:
        """All of a domain, normalised. Shape: [k, d]

        Raises:
            ValueError: if there is nothing, or something that is not finite.
        """
        found, self.found = torch.cat([torch.empty(0), *self.found]), []
        if len(found) == 0:
            raise ValueError(f"The {domain} gave no tokens; expected at least one batch that has some.")
        if not found.isfinite().all():
            raise ValueError(f"The hidden states of the {domain} are NaN or infinite; expected finite ones.")
        return found


class Disturbance:
    """Finds out whether tokens see those after them: changes the last one, and looks at the others.

    Args:
        path: the feedback path of the backbone.
    """

    def __init__(self, path: FeedbackPath) -> None:
        self.path = path
        self.last: torch.Tensor | None = None  # which token of each row is changed; [b]
        self.features: list[torch.Tensor] = []  # without and with the change; [b, n, d]
        self.is_over = True

    def hooks(self) -> Iterator[Any]:
        """Set the hooks."""
        first_block = self.path.passes.block_forwards[0].module
        yield first_block.register_forward_pre_hook(self.disturb, with_kwargs=True)
        yield self.path.register_forward_pre_hook(self.keep, with_kwargs=True)

    def disturb(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A hook: the other way round, which no norm undoes."""
        if self.is_over or self.last is None:
            return None
        self.is_over = True  # a block may run several times
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[torch.arange(len(x)), self.last] *= -1
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def keep(self, path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook: the features, after pass 1."""
        self.features.append(args[0].float())
        own = kwargs["tokens"].own
        own = torch.ones(args[0].shape[:2], device=args[0].device) if own is None else own
        self.last = (torch.arange(own.shape[1], device=own.device) * own).argmax(1)

    def was_seen(self) -> bool:
        """Whether tokens before the last ones have changed."""
        assert self.last is not None
        plain, disturbed = self.features
        is_before = torch.arange(plain.shape[1], device=plain.device) < self.last.unsqueeze(1)
        return bool(((disturbed - plain).abs().amax(-1)[is_before] > _DISTURBED * plain.abs().max()).any())


@torch.no_grad()
def fit_gate(
    model: PeftModel | nn.Module,
    target: Batches,
    reference: Reference,
    adapter_name: str = "default",
    gate: Kind | None = None,
    quantile: float | None = None,
) -> dict[str, float]:
    """Fit the gate of an adapter, which then leaves alone what is like the reference and not like the target.

    Where the gate is closed the output is that of the base model, bit for bit. It depends on the base model only, so
    that it can be fitted before the adapter is trained or after. 64 rows of 128 tokens a side are enough; all that the
    gate compares is kept in memory, 4 d bytes a token.

    Args:
        model: has the adapter, which must be active.
        target: what the adapter is for, batches of inputs of the model as dicts. Padding is left out.
        reference: the model's usual work, the same; or several domains of it by their names, each of which the gate is
            to be closed for. "generate" lets the base model write it, as it does by itself.
        adapter_name: the adapter.
        gate: "sequence" or "token", see [`TopDownConfig`]. Default: what the config says, else "sequence".
        quantile: how strict it is: the share of each domain of the reference for which it is closed. Default: 0.99;
            1 if the reference is generated.

    Returns:
        `auc`, the probability that a token of the target is more like it than one of the reference; `open_target` and
        `open_reference`, the shares of tokens for which the gate is open, of several domains `open_<name>`. If encoder
        and decoder get feedback, with the names of their blocks before. The config keeps it as `gate_report`.

    Raises:
        ValueError: if the model has no such active adapter, if the data is of no use, or both sides look the same. The
            gate is unchanged then.

    Example:

    ```py
    >>> model = get_peft_model(base, TopDownConfig(r=8, gate="sequence"))
    >>> toast_peft.fit_gate(model, target=law_batches, reference={"news": news_batches, "chat": chat_batches})
    {'auc': 0.99, 'open_target': 0.93, 'open_news': 0.01, 'open_chat': 0.0}
    ```
    """
    paths = {path.passes.backbone_forward.blocks_name: path for _, path in feedback_paths(model)}
    _check(paths, adapter_name, gate, quantile)
    if quantile is None:
        quantile = 1.0 if isinstance(reference, str) else _QUANTILE
    domains = _domains(model, reference)
    config = next(iter(paths.values())).selection.topdown_config[adapter_name]
    with _new_gates(paths, config, adapter_name, gate or config.gate or "sequence"):
        collected = {name: Compared(path, adapter_name) for name, path in paths.items()}
        first, target = _begun(target)
        for name, path in paths.items():
            collected[name].gate.is_causal = _is_causal(model, path, first)
        y = {domain: _of_domain(model, batches, domain, collected) for domain, batches in domains.items()}
        y_target = _of_domain(model, target, "target", collected)
        fits = {
            name: _fit(y_target[name], {domain: found[name] for domain, found in y.items()}, quantile)
            for name in paths
        }
    for name, fit in fits.items():
        _set(collected[name].gate, fit)
    config.gate_is_causal = {name: compared.gate.is_causal for name, compared in collected.items()}
    config.gate_report = {
        (f"{name}." if len(fits) > 1 else "") + key: value
        for name, fit in fits.items()
        for key, value in fit.report.items()
    }
    _warn_if_it_cannot_tell(adapter_name, fits.values())
    return config.gate_report


def _check(paths: Mapping[str, FeedbackPath], adapter_name: str, gate: str | None, quantile: float | None) -> None:
    if not paths or any(path.active_adapter != adapter_name for path in paths.values()):
        active = sorted({str(path.active_adapter) for path in paths.values()}) or "none"
        raise ValueError(f"`adapter_name` is {adapter_name!r}; expected the active TOAST adapter, which is {active}.")
    if any(path.selection.topdown_config[adapter_name].double_value_bias for path in paths.values()):
        raise ValueError(
            "`double_value_bias=True` makes pass 2 differ from pass 1 also where a gate is closed; expected False."
        )
    if gate not in (None, *get_args(Kind)):
        raise ValueError(f"`gate` is {gate!r}; expected 'sequence' or 'token'.")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"`quantile` is {quantile!r}; expected a share between 0 and 1.")


def _domains(model: nn.Module, reference: Any) -> dict[str, Batches]:
    """The domains of the reference by their names."""
    if isinstance(reference, str):
        if reference != "generate":
            raise ValueError(
                f"`reference` is {reference!r}; expected batches of inputs, a dict of these or 'generate'."
            )
        return {"reference": _generated(model)}
    return dict(reference) if isinstance(reference, Mapping) else {"reference": reference}


def _generated(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """What the base model writes by itself, always the same. Shape of each: [b, n]"""
    if not isinstance(model, PeftModel) or not getattr(model.get_base_model(), "can_generate", bool)():
        raise ValueError(
            f"`reference='generate'` was given for a {type(model).__name__}; expected a `PeftModel` that generates "
            "text. Give batches of the model's usual work."
        )
    settings = model.generation_config
    starts = [settings.bos_token_id, settings.eos_token_id]
    start = next((token for token in starts if isinstance(token, int)), None)
    if start is None:
        raise ValueError(
            "`reference='generate'` needs a token to begin with, and the model has neither `bos_token_id` nor "
            "`eos_token_id` in its generation config. Give batches of the model's usual work."
        )
    rows, length = _GENERATED
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    first = torch.full((rows // 4, 1), start, device=model.device)
    device = [model.device] if model.device.type != "cpu" else []
    with (
        torch.random.fork_rng(device, device_type=model.device.type),
        model.disable_adapter(),
        in_evaluation_mode(model.modules()),
    ):
        torch.manual_seed(0)
        written = [
            model.generate(
                input_ids=first,
                attention_mask=torch.ones_like(first),
                min_new_tokens=length - 1,  # no end in between
                max_new_tokens=length - 1,
                **sampling,
            )
            for _ in range(4)
        ]
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in written]


@contextmanager
def _new_gates(
    paths: Mapping[str, FeedbackPath], config: TopDownConfig, adapter_name: str, gate: Kind
) -> Iterator[None]:
    """Put new gates, which are open, on an adapter; on failure it has those of before."""
    selections = [path.selection for path in paths.values()]
    before, gates = config.gate, [dict(selection.topdown_gate.items()) for selection in selections]
    config.gate = gate
    for selection in selections:
        selection.add_gate(adapter_name, gate)
    try:
        yield
    except BaseException:
        config.gate = before
        for selection, of_selection in zip(selections, gates, strict=True):
            selection.topdown_gate.clear()
            selection.topdown_gate.update(of_selection)
        raise


def _begun(batches: Batches) -> tuple[dict[str, Any], Batches]:
    """The first batch, and all."""
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("The target has no batches; expected at least one.")
    return first, chain([first], iterator) if iterator is batches else batches


def _is_causal(model: nn.Module, path: FeedbackPath, batch: dict[str, Any]) -> bool:
    """Whether the tokens of a backbone see only those before them."""
    if not path.keeps_shape:  # a map
        return False
    disturbance = Disturbance(path)
    for is_disturbed in (False, True):
        disturbance.is_over = not is_disturbed
        collect(model, [batch], [disturbance])
    return not disturbance.was_seen()


def _of_domain(
    model: nn.Module, batches: Batches, domain: str, collected: Mapping[str, Compared]
) -> dict[str, torch.Tensor]:
    """What the gate of each backbone compares, of a domain. Shape of each: [k, d]"""
    collect(model, logging.tqdm(batches, desc=f"Looking at the {domain}"), list(collected.values()))
    return {name: compared.take(domain) for name, compared in collected.items()}


def _fit(target: torch.Tensor, domains: Mapping[str, torch.Tensor], quantile: float) -> Fit:
    """The gate in closed form.

    Args:
        target: Shape: [k, d]
        domains: those of the reference. Shape of each: [k, d]
        quantile: the share of each of them for which it is closed.
    """
    target, domains = target.double(), {name: y.double() for name, y in domains.items()}
    reference = torch.cat(list(domains.values()))
    direction = target.mean(0) - reference.mean(0)
    if len(domains) > 1:
        covariance = (_covariance(target) + _covariance(reference)) / 2
        ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
        direction = torch.linalg.solve(covariance + ridge, direction)
    if not direction.norm() > 1e-9:
        raise ValueError("Target and reference have the same features; expected two that differ.")
    direction = F.normalize(direction, dim=0)
    opened, closed = target @ direction, {name: y @ direction for name, y in domains.items()}
    of_reference = torch.cat(list(closed.values()))
    threshold = max(float(np.quantile(scores.numpy(), quantile, method="higher")) for scores in closed.values())
    threshold += _ROUNDING
    spread = float(of_reference.std(unbiased=False))
    width = max(float(opened.median()) - threshold, _NARROW * spread, _NARROWEST)
    report = {"auc": _auc(opened, of_reference), "open_target": _share_above(opened, threshold)}
    names = {name: f"open_{name}" for name in closed}
    report |= {names[name]: _share_above(cosines, threshold) for name, cosines in closed.items()}
    return Fit(direction, threshold, width, report)


def _covariance(y: torch.Tensor) -> torch.Tensor:
    """Shape: [k, d] -> [d, d]"""
    centred = y - y.mean(0)
    return centred.T @ centred / len(y)


def _auc(target: torch.Tensor, reference: torch.Tensor) -> float:
    """How often a score of the target is higher than one of the reference, ties by half. Shapes: [k], [k]"""
    ordered = reference.sort().values
    ranks = torch.searchsorted(ordered, target) + torch.searchsorted(ordered, target, right=True)
    return float(ranks.double().mean() / (2 * len(ordered)))


def _share_above(cosines: torch.Tensor, threshold: float) -> float:
    return float((cosines > threshold).double().mean())


def _set(gate: Gate, fit: Fit) -> None:
    gate.direction.copy_(fit.direction)
    gate.threshold.fill_(fit.threshold)
    gate.width.fill_(fit.width)


def _warn_if_it_cannot_tell(adapter_name: str, fits: Iterable[Fit]) -> None:
    report = min((fit.report for fit in fits), key=lambda report: report["open_target"])
    if report["auc"] < 0.9 or report["open_target"] < 0.5:
        warnings.warn(
            f"The gate of the TOAST adapter {adapter_name!r} does not tell the target well from the reference: of two "
            f"tokens the one of the target is more like it {report['auc']:.0%} of the time, and the gate is open for "
            f"{report['open_target']:.0%} of the target. Where it is closed the adapter does nothing. Give a "
            "reference that is less like the target, more rows, or a lower `quantile`.",
            stacklevel=3,
        )

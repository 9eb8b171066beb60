"""Fits the gate of an adapter in closed form: which inputs the adapter is for, and which it is to leave alone.

    prior     = 16 times the mean of normalise(x) over the tokens of a domain of the reference, the mean of these
    direction = normalise(mean of y over the target - mean of y over the reference)
                with several domains in the reference: normalise((C + mean(diag C))^-1 (that difference)), where C is
                the mean of the covariances of target and reference
    threshold = the 0.95 quantile, over the rows of a domain of the reference, of the largest cos(y, direction) in
                each; of these the largest. In a gate that looks at tokens alone the 0.99 quantile over the tokens
    width     = max(median of cos(y, direction) over the target - threshold, 0.3 times its standard deviation over the
                reference)

The covariance is shrunk half-way to a multiple of the identity: what a few rows say about it holds for these rows, and
a gate that trusts it is closed for them and not for others of their domain (docs/gates.md has the measurement).

The sum over a few tokens is mostly noise. Without the prior it would set the threshold, and the gate would stay closed
for all that comes later.

What x and y are, and what the gate does, is in `core/gate.py`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - k: number of tokens of a domain, or of rows if the gate gives one number for a whole row
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import length_hint
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .collecting import collect
from .config import TopDownConfig
from .config_checks import is_of_type
from .core.dropout import in_evaluation_mode
from .core.gate import Gate
from .core.layers import FeedbackPath, check_is_active, paths_with
from .gate_collection import Compared, Disturbance, Domain

Batches = Iterable[dict[str, Any]]
Reference = Batches | Mapping[str, Batches] | Literal["generate"]
Kind = Literal["sequence", "token"]

_RIDGE = 1.0  # relative to the mean variance of a channel
_NARROW = 0.3  # a width that the reference itself spans would never open for a target that is near
_PRIOR = 16.0  # tokens
_QUANTILE = {"sequence": 0.95, "token": 0.99}  # of rows, of tokens
_FEWEST_ROWS = 20  # of fewer, the 0.95 quantile is the largest
_GENERATED = (64, 128)  # rows and tokens of what the base model writes as a reference
_ROUNDING = 1e-6  # of a cosine: what lies on the threshold is closed
_NARROWEST = 1e-6  # of a reference whose features are all the same


class Fit(NamedTuple):
    """A gate, and how well it separates.

    Args:
        prior: zero in a gate that looks at tokens alone. Shape: [d]
        direction: Shape: [d]
        threshold: a cosine.
        width: a difference of cosines.
        report: `auc`, and the shares of open tokens.
    """

    prior: torch.Tensor
    direction: torch.Tensor
    threshold: float
    width: float
    report: dict[str, float]


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
    that it can be fitted before the adapter is trained or after. 64 rows of 128 tokens a side are enough to leave
    alone what is like the reference; 256 and a `quantile` of 0.98 for what is not like it either. All that the gate
    compares is kept in memory, 4 d bytes a token.

    Args:
        model: has the adapter, which must be active.
        target: what the adapter is for, batches of inputs of the model as dicts. Padding is left out.
        reference: the model's usual work, the same; or several domains of it by their names, each of which the gate is
            to be closed for. "generate" lets the base model write it, as it does by itself.
        adapter_name: the adapter.
        gate: "sequence" or "token", see [`TopDownConfig`]. Default: what the config says, else "sequence".
        quantile: how strict it is: the share of the rows of each domain of the reference for which it is closed from
            their first token to the last; of a "token" gate, the share of the tokens. Default: 0.95 of rows, 0.99 of
            tokens, 1 if the reference is generated. Texts packed into a row count as rows. With an encoder and a
            decoder it is the share for each of them.

    Returns:
        `auc`, the probability that a token of the target is more like it than one of the reference; `open_target` and
        `open_reference`, the shares of tokens for which the gate is open, of several domains `open_<name>`. If encoder
        and decoder get feedback, with the names of their blocks before. The config keeps it as `gate_report`. It is of
        the rows that the gate was fitted to; what it does to others tells `feedback_statistics(model)["mean_gate"]`
        after a forward with some of them.

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
    check_is_active(model, adapter_name)
    paths = {path.passes.backbone_forward.blocks_name: path for _, path in paths_with(model, adapter_name)}
    _check(paths, adapter_name, gate, quantile)
    domains = _domains(model, reference)
    config = next(iter(paths.values())).selection.topdown_config[adapter_name]
    kind = gate or config.gate or "sequence"
    if quantile is None:
        quantile = 1.0 if isinstance(reference, str) else _QUANTILE[kind]
    with _new_gates(paths, config, adapter_name, kind):
        collected = {name: Compared(path, adapter_name) for name, path in paths.items()}
        num_batches = length_hint(target) or None
        are_causal, target = _who_sees_later_tokens(model, paths, target)
        for name, is_causal in are_causal.items():
            collected[name].gate.set_causal(is_causal)
        seen = {domain: _of_domain(model, batches, domain, collected) for domain, batches in domains.items()}
        of_target = _of_domain(model, target, "target", collected, num_batches)
        fits = {
            name: _fit(
                of_target[name],
                {domain: found[name] for domain, found in seen.items()},
                quantile,
                collected[name].gate,
            )
            for name in paths
        }
    for name, fit in fits.items():
        _set(collected[name].gate, fit)
    config.gate_is_causal = {name: bool(compared.gate.is_causal) for name, compared in collected.items()}
    config.gate_report = {
        (f"{name}." if len(fits) > 1 else "") + key: value
        for name, fit in fits.items()
        for key, value in fit.report.items()
    }
    _warn_of_few_rows(adapter_name, [of_target, *seen.values()])
    _warn_if_it_cannot_tell(adapter_name, fits.values())
    return config.gate_report


def _check(paths: Mapping[str, FeedbackPath], adapter_name: str, gate: str | None, quantile: float | None) -> None:
    if any(path.selection.topdown_config[adapter_name].double_value_bias for path in paths.values()):
        raise ValueError(
            "`double_value_bias=True` makes pass 2 differ from pass 1 also where a gate is closed; expected False."
        )
    if gate not in (None, *get_args(Kind)):
        raise ValueError(f"`gate` is {gate!r}; expected 'sequence' or 'token'.")
    if quantile is not None and not (is_of_type(quantile, float) and 0 <= quantile <= 1):
        raise ValueError(f"`quantile` is {quantile!r}; expected a share between 0 and 1.")


def _domains(model: nn.Module, reference: Any) -> dict[str, Batches]:
    """The domains of the reference by their names."""
    if isinstance(reference, Mapping) and not reference:
        raise ValueError("`reference` has no domains; expected at least one.")
    if isinstance(reference, Mapping) and any(isinstance(value, torch.Tensor) for value in reference.values()):
        raise ValueError(
            "`reference` is one batch, the keys of which would be names of domains; expected a list of batches: "
            "[batch]."
        )
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


def _who_sees_later_tokens(
    model: nn.Module, paths: Mapping[str, FeedbackPath], batches: Batches
) -> tuple[dict[str, bool], Batches]:
    """Which backbones are causal, by the first batch that tells, and all batches once more."""
    # What was read stays, as it may be a stream: asking a `DataLoader` for its iterator does not begin that anew.
    iterator, begun, found = iter(batches), [], dict[str, bool | None]()
    for batch in iterator:
        begun.append(batch)
        found |= {name: _is_causal(model, path, batch) for name, path in paths.items() if found.get(name) is None}
        if None not in found.values():
            break
    if not begun:
        raise ValueError("The target has no batches; expected at least one.")
    # Where no row has two tokens either is right for the target; a causal gate never lets a token see later ones.
    return {name: is_causal is not False for name, is_causal in found.items()}, chain(begun, iterator)


def _is_causal(model: nn.Module, path: FeedbackPath, batch: dict[str, Any]) -> bool | None:
    """Whether the tokens of a backbone see only those before them; `None` if none of the batch has one before it."""
    if not path.keeps_shape:  # a map
        return False
    disturbance = Disturbance(path)
    for is_disturbed in (False, True):
        disturbance.is_over = not is_disturbed
        collect(model, [batch], [disturbance])
    was_seen = disturbance.was_seen()
    return None if was_seen is None else not was_seen


def _of_domain(
    model: nn.Module,
    batches: Batches,
    domain: str,
    collected: Mapping[str, Compared],
    num_batches: int | None = None,
) -> dict[str, Domain]:
    """What the gate of each backbone looks at in a domain; the progress bar asks it for the number of its batches."""
    shown = logging.tqdm(batches, desc=f"Looking at the {domain}", total=num_batches)
    collect(model, shown, list(collected.values()))
    return {name: compared.take(domain) for name, compared in collected.items()}


def _fit(target: Domain, domains: Mapping[str, Domain], quantile: float, gate: Gate) -> Fit:
    """The gate in closed form.

    Args:
        target: what the adapter is for.
        domains: those of the reference.
        quantile: the share of each of them for which it is closed.
        gate: the gate; all is fitted to what is left of prior and direction in its dtype.
    """
    dtype, tokens = gate.direction.dtype, 0.0 if gate.prior is None else _PRIOR
    prior = (tokens * torch.stack([domain.mean for domain in domains.values()]).double().mean(0)).to(dtype)
    target, domains = target.after(prior), {name: domain.after(prior) for name, domain in domains.items()}
    direction = _direction(target.y, [domain.y for domain in domains.values()]).to(dtype)
    unit = F.normalize(direction.double(), dim=0)
    opened, closed = target.y @ unit, {name: domain.y @ unit for name, domain in domains.items()}
    of_reference = torch.cat(list(closed.values()))
    largest = (domains[name].largest(scores) for name, scores in closed.items())
    threshold = max(float(np.quantile(scores.numpy(), quantile, method="higher")) for scores in largest)
    threshold = _not_below(threshold + _ROUNDING, dtype)
    spread = float(of_reference.std(unbiased=False))
    width = max(float(opened.median()) - threshold, _NARROW * spread, _NARROWEST)
    report = {"auc": _auc(opened, of_reference), "open_target": _share_above(opened, threshold)}
    report |= {f"open_{name}": _share_above(cosines, threshold) for name, cosines in closed.items()}
    return Fit(prior, direction, threshold, width, report)


def _not_below(value: float, dtype: torch.dtype) -> float:
    """The next number that there is in a dtype."""
    rounded = torch.tensor(value, dtype=dtype)
    return float(rounded if rounded.double() >= value else rounded.nextafter(torch.ones_like(rounded)))


def _direction(target: torch.Tensor, domains: list[torch.Tensor]) -> torch.Tensor:
    """What tells the target from the reference. Shapes: [k, d], [k, d] of each domain -> [d]"""
    reference = torch.cat(domains)
    direction = target.mean(0) - reference.mean(0)
    if len(domains) > 1:
        covariance = (_covariance(target) + _covariance(reference)) / 2
        ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
        direction = torch.linalg.solve(covariance + ridge, direction)
    if not direction.norm() > 1e-9:
        raise ValueError("Target and reference have the same features; expected two that differ.")
    return F.normalize(direction, dim=0)


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
    if gate.prior is not None:
        gate.prior.copy_(fit.prior)
    gate.direction.copy_(fit.direction)
    gate.threshold.fill_(fit.threshold)
    gate.width.fill_(fit.width)


def _warn_of_few_rows(adapter_name: str, domains: Iterable[Mapping[str, Domain]]) -> None:
    fewest = min(len(of_path.rows.unique()) for domain in domains for of_path in domain.values())
    if fewest < _FEWEST_ROWS:
        warnings.warn(
            f"The gate of the TOAST adapter {adapter_name!r} was fitted to as few as {fewest} rows of a domain, to "
            "which it then fits better than to others: new ones of the reference may open it. Give 64 of each.",
            stacklevel=3,
        )


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

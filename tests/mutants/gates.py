"""What may go wrong with the gate of an adapter."""

from .mutant import Mutant

GATE = "features/test_gate.py -k "
SAVED = "features/test_saved_gates.py -k "
CAUSALITY = "features/test_gate_causality.py -k "
FIT = "features/test_gate_fitting.py -k "

OF_A_GATE = [
    Mutant(
        "gate: no prior",
        ", bool(self.is_causal)) + self.prior.to(x.dtype)",
        ", bool(self.is_causal))",
        f"{GATE}formula",
    ),
    Mutant("gate: not used", "mask = gate * mask", "pass", f"{GATE}factor_of_the_mask"),
    Mutant(
        "gate: sum of features that are not normalised",
        "    steps = F.normalize(precise(x.detach()), dim=-1)\n",
        "    steps = precise(x.detach())\n",
        f"{GATE}formula",
    ),
    Mutant(
        "gate: padding is counted",
        "return steps if own is None else steps * own.unsqueeze(-1)",
        "return steps",
        f"{GATE}formula",
    ),
    Mutant(
        "gate: open at padding",
        "            opened = opened * tokens.own\n",
        "            pass\n",
        f"{GATE}formula",
    ),
    Mutant(
        "gate: texts of a row are one",
        "return sums if tokens.starts is None else sums - _before_the_text(sums, tokens.starts)",
        "return sums",
        f"{GATE}packed",
    ),
    Mutant(
        "gate: first token of a text belongs to the one before",
        "return F.pad(sums, (0, 0, 1, 0)).gather(",
        "return sums.gather(",
        f"{GATE}packed",
    ),
    Mutant("gate: the cache is not asked", "if tokens.sums is not None:", "if False:", f"{GATE}cached_is_recomputed"),
    Mutant(
        "gate: last token of a static cache is the next one",
        "(length - 1).clamp(min=0).view(1)",
        "length.clamp(min=0).view(1)",
        f"{GATE}'cached_is_recomputed and static'",
    ),
    Mutant(
        "gate: sum is lost where the passes part",
        "upper + of_loop + passes.sums",
        "upper + of_loop",
        f"{GATE}'follows_what_is_done'",
    ),
    Mutant(
        "gate: padding of a mask of four dimensions",
        "return mask > _HIDDEN if mask.is_floating_point() else mask != 0",
        "return torch.ones_like(mask, dtype=torch.bool)",
        "features/test_padding.py -k each_form",
    ),
    Mutant("gate: trained", 'frozen=("topdown_gate",)', "frozen=()", f"{GATE}not_trained"),
    Mutant(
        "gate: whole row is not remembered in the file",
        "(config.gate_is_causal or {}).get(blocks_name)",
        "None",
        f"{SAVED}before_it_was",
    ),
    Mutant(
        "gate: whole row is not remembered in the weights",
        "self.is_causal = None if causal < 0 else bool(causal > 0.5)",
        "pass",
        f"{SAVED}over_another",
    ),
    Mutant(
        "gate: features are in the graph",
        "x = precise(features.detach().flatten(1, -2))",
        "x = precise(features.flatten(1, -2).sin())",
        f"{GATE}formula",
    ),
    Mutant(
        "gate fit: several domains by the means only",
        "    if len(domains) > 1:\n",
        "    if False:\n",
        f"{FIT}covariance",
    ),
    Mutant(
        "gate fit: threshold of the easiest domain",
        'threshold = max(float(np.quantile(scores.numpy(), quantile, method="higher"))',
        'threshold = min(float(np.quantile(scores.numpy(), quantile, method="higher"))',
        f"{FIT}covariance",
    ),
    Mutant(
        "gate fit: quantile of tokens",
        "largest = (domains[name].largest(scores) for name, scores in closed.items())",
        "largest = closed.values()",
        f"{FIT}share_of_rows",
    ),
    Mutant(
        "gate fit: rows of a batch are those of the one before",
        ".view(shape) - 1 + self.num_rows",
        ".view(shape) - 1",
        f"{FIT}share_of_rows",
    ),
    Mutant(
        "gate fit: prior of the sum, not of the mean",
        "self.total / self.num_tokens",
        "self.total",
        f"{FIT}means",
    ),
    Mutant(
        "gate fit: a token gate gets whole rows",
        "rows if self.gate.prior is not None else torch.arange(len(y))",
        "rows",
        f"{FIT}means",
    ),
    Mutant(
        "gate fit: padding is in the prior",
        "steps[own].sum(0).cpu()",
        "steps.sum((0, 1)).cpu()",
        f"{FIT}padding_is",
    ),
    Mutant(
        "gate fit: packed texts are one row",
        "== 0 if tokens.starts is None else tokens.starts",
        "== 0",
        f"{FIT}packed",
    ),
    Mutant(
        "gate fit: low precision opens the reference",
        "_not_below(threshold + _ROUNDING, dtype)",
        "threshold + _ROUNDING",
        f"{FIT}low_precision",
    ),
    Mutant(
        "gate fit: rounding opens the reference",
        "_not_below(threshold + _ROUNDING, dtype)",
        "_not_below(threshold - 10 * _ROUNDING, dtype)",
        f"{FIT}gets_the_output_of_the_base_model",
    ),
    Mutant(
        "gate fit: padding is looked at",
        "self.y.append(y[has_tokens].cpu())",
        "self.y.append(y.flatten(0, 1).cpu())",
        f"{FIT}padding_is",
    ),
    Mutant(
        "gate fit: disturbs a token that nobody sees",
        "self.last = (positions * own).argmax(1)",
        "self.last = torch.full((len(own),), own.shape[1] - 1, device=own.device)",
        f"{CAUSALITY}does_not_hide",
    ),
    Mutant(
        "gate fit: a batch that cannot tell says that nobody sees later tokens",
        "        if not self.is_before.any():\n            return None\n",
        "",
        f"{CAUSALITY}'without_two_tokens or one_token'",
    ),
    Mutant(
        "gate fit: a stream loses what was looked at first",
        "chain(begun, iterator)",
        "batches",
        f"{FIT}stream",
    ),
    Mutant(
        "gate fit: the base model writes with the adapter",
        "        torch.random.fork_rng(device, device_type=model.device.type),\n        model.disable_adapter(),\n",
        "        torch.random.fork_rng(device, device_type=model.device.type),\n",
        f"{FIT}writes_the_reference",
    ),
    Mutant(
        "gate fit: failure leaves an open gate",
        "            selection.topdown_gate.update(of_selection)\n",
        "            pass\n",
        f"{FIT}leaves_the_model",
    ),
]

"""What may go wrong where several adapters run in one forward."""

from .mutant import Mutant

EXPLAIN = "features/test_explain_adapters.py -k "
SEVERAL = "features/test_several_adapters.py -k "
MIXED = "features/test_mixed_batches.py -k "

OF_SEVERAL_ADAPTERS = [
    Mutant(
        "several: the last one only",
        "total[index] = total[index] + td if index in total else td",
        "total[index] = td",
        f"{SEVERAL}sum_by_hand",
    ),
    Mutant(
        "several: all start where the highest does",
        "self.outputs[max(i for i in self.outputs if i < index)]",
        "self.last_output",
        f"{SEVERAL}sum_by_hand",
    ),
    Mutant(
        "several: outputs below the highest start are not kept",
        "kept_below=max(starts) if min(starts) < max(starts) else 0",
        "kept_below=0",
        f"{SEVERAL}sum_by_hand",
    ),
    Mutant("several: pass 2 from where the first ends", "min(ends),", "ends[0],", f"{SEVERAL}cost_is_that"),
    Mutant(
        "several: LoRA of pass 2 of the last one only",
        "second_pass += [] if added is None else [added._replace(rows=rows)]",
        "second_pass = [] if added is None else [added._replace(rows=rows)]",
        f"{SEVERAL}lora_of_pass_2",
    ),
    Mutant(
        "several: rows that only one of them changes are skipped",
        "torch.stack(opened).any(0)",
        "torch.stack(opened).all(0)",
        f"{SEVERAL}closed_rows_are_those",
    ),
    Mutant(
        "several: a running sum for all kinds of features",
        "num_sums=len(summed)",
        "num_sums=min(1, len(summed))",
        f"{SEVERAL}'running_sums and False'",
    ),
    Mutant(
        "several: features are those of the first",
        "kind = (adapter.feedback_from, self._normalizes(adapter), gate)",
        "kind = (gate,)",
        f"{SEVERAL}sum_by_hand",
    ),
    Mutant(
        "several: a cache does not know the set",
        "identity = [tuple(identities[name] for name in names if name in identities) for names in rows]",
        "identity = [()]",
        f"{MIXED}cached_is_recomputed_with_gates",
    ),
    Mutant(
        "several: the bias once more of whoever is first",
        "            if config.double_value_bias\n",
        "            if False\n",
        f"{SEVERAL}'has_no_sum and double'",
    ),
    Mutant(
        "several: the variational loss of whoever is first",
        "if training and config.variational_weight > 0\n            else None",
        "if False\n            else None",
        f"{SEVERAL}'has_no_sum and variational'",
    ),
    Mutant("several: unknown names", "        if unknown:\n", "        if False:\n", f"{SEVERAL}unknown_names"),
    Mutant(
        "several: what is for one takes the first",
        "        if len(names) > 1:\n            raise ValueError(",
        "        if False:\n            raise ValueError(",
        f"{SEVERAL}'says_so and fuse_feedback'",
    ),
    Mutant(
        "several: stored features of another pass 1",
        "for adapter in run.adapters:\n            stored.check",
        "for adapter in run.adapters[:1]:\n            stored.check",
        f"{SEVERAL}stored_features_serve",
    ),
    Mutant(
        "mixed: feedback of the rows before is lost",
        "total[index] = rows.put(td, total.get(index))",
        "total[index] = rows.put(td)",
        f"{MIXED}'each_row_is and ViT'",
    ),
    Mutant(
        "mixed: a gate takes the tokens of other rows",
        "None if self.tokens is None else self.tokens.of_rows(rows)",
        "self.tokens",
        f"{MIXED}'padding_and_gates and left'",
    ),
    Mutant(
        "mixed: LoRA of pass 2 in the rows of others",
        "whole.index_add(0, rows.indices.to(output.device), added)",
        "whole.index_add(0, rows.indices.to(output.device).flip(0), added)",
        f"{MIXED}'lora_of_pass_2 and ViT and None'",
    ),
    Mutant(
        "mixed: what is left of the rows where closed ones are skipped",
        "is_there.any(0).nonzero().flatten()",
        "self.indices[is_there.any(1)]",
        f"{MIXED}'without_adapter_are_skipped and pass2'",
    ),
    Mutant(
        "mixed: a head that an adapter does not have is that of the active one",
        "[name if name in self.available else BASE for name in of_rows]",
        "[name or BASE for name in of_rows]",
        f"{MIXED}modules_to_save_are_those",
    ),
    Mutant(
        "mixed: rows are cut where a module of each row runs",
        "self.state.current.row_names and has_modules_of_rows(self.module)",
        "False",
        f"{MIXED}modules_to_save_in_the_backbone",
    ),
    Mutant(
        "mixed: names are repeated where they are too few",
        "repeats > 0 and (repeats == 1 or may_repeat)",
        "repeats > 0",
        f"{MIXED}names_are_counted",
    ),
    Mutant(
        "mixed: as many images as rows are one of each",
        "if parts > 1 or (parts == 0 and",
        "if parts > 1 or (False and",
        "features/test_batch_rows.py -k adapters_of_rows_with_other_numbers",
    ),
    Mutant(
        "mixed: in training mode",
        '    if model.training:\n        raise ValueError("`adapter_names`',
        '    if False:\n        raise ValueError("`adapter_names`',
        f"{MIXED}refused_in_training",
    ),
    Mutant(
        "mixed: while fused", 'refuse_fused(self.model, "run a mixed batch")', "pass", f"{MIXED}refused_in_training"
    ),
    Mutant(
        "mixed: names stay when it is over",
        "                current.row_names = outer",
        "                pass",
        f"{MIXED}after_it_all_is_as_before",
    ),
    Mutant(
        "explain: the last of several adapters",
        "        if name != self.adapter_name:\n",
        "        if False:\n",
        f"{EXPLAIN}active_together",
    ),
    Mutant(
        "explain: pass 1 keeps LoRA of pass 2",
        "        with rescaled([path.selection], 0.0):\n            first",
        "        if True:\n            first",
        f"{EXPLAIN}'whatever_pass_2_adds and ViT'",
    ),
]

"""What may go wrong where both passes run side by side."""

from .mutant import Mutant

WHERE = "features/test_drafting.py -k "

OF_DRAFTING = [
    Mutant(
        "drafting: a wrong draft is kept",
        "if draft is None or not torch.equal(token, draft):",
        "if draft is None:",
        f"{WHERE}'same_tokens and Llama'",
    ),
    Mutant(
        "drafting: the column of a wrong draft is kept",
        "                layer.crop(-1)\n        self.num_columns -= 1\n",
        "                pass\n",
        f"{WHERE}'same_tokens and Llama'",
    ),
    Mutant(
        "drafting: both rows at the same position",
        "position_ids=torch.cat([self.position + 1, self.position]),",
        "position_ids=torch.cat([self.position, self.position]),",
        f"{WHERE}'same_tokens and Llama'",
    ),
    Mutant(
        "drafting: the column before the second row is seen",
        "torch.cat([mask, F.pad(mask[:, :-1], (1, 0))])",
        "torch.cat([mask, F.pad(mask[:, :-1], (1, 0), value=1)])",
        f"{WHERE}'same_tokens and Llama'",
    ),
    Mutant(
        "drafting: feedback in pass 1 as well",
        "else self._with_first_rows(self.features)",
        "else self.features.repeat(1 + self.num_first_rows, 1, 1)",
        f"{WHERE}'same_tokens and Llama'",
    ),
    Mutant(
        "drafting: features of the last block with early feedback",
        "        if self.index < run.feedback_from:\n            run.last_output = output",
        "        run.last_output = output",
        f"{WHERE}'same_tokens and Llama and early'",
    ),
    Mutant(
        "drafting: state left by an error",
        "        finally:\n            current.joint = None\n",
        "        finally:\n            pass\n",
        f"{WHERE}leaves_nothing",
    ),
    Mutant(
        "drafting: several positions of a token",
        "if positions.dim() != 2:",
        "if False:",
        f"{WHERE}'refused and Qwen'",
    ),
    Mutant(
        "drafting: a sequence gate forgets the tokens before",
        "            sums = sums + self._with_first_rows(self.sums_before)\n",
        "            pass\n",
        f"{WHERE}'same_logits and sequence'",
    ),
    Mutant(
        "drafting: a wrong draft is counted twice by a sequence gate",
        "self.token, self.features, self.sums_before = self.next_token, self.next_features, self.next_sums\n",
        "self.token, self.features = self.next_token, self.next_features\n",
        f"{WHERE}'same_logits and sequence'",
    ),
    Mutant(
        "drafting: a sequence gate counts the padding of the prompt",
        'own = tokens_for("sequence", kwargs, features).own if self.sums_before is None else None',
        "own = None",
        f"{WHERE}'same_logits and sequence'",
    ),
    Mutant(
        "drafting: LoRA of pass 2 in pass 1 as well",
        "return added._replace(gate=self._with_first_rows(gate[self.num_first_rows :]))",
        "return added._replace(gate=gate)",
        f"{WHERE}'same_logits and LoRA'",
    ),
    Mutant(
        "drafting: no LoRA of pass 2",
        "run.second_pass = () if added is None else (joint.in_second_rows(added, features),)",
        "pass",
        f"{WHERE}'same_logits and LoRA'",
    ),
]

"""What may go wrong in what pass 2 adds besides the feedback."""

from .mutant import Mutant

LORA = "features/test_pass2_lora.py -k "
ADAPTERS = "features/test_pass2_adapters.py -k "
OUTPUT = "features/test_output_feedback.py -k "

OF_THE_SECOND_PASS = [
    Mutant(
        "LoRA of pass 2: not under the gate",
        "return added if gate is None else gate_of_input(gate, x).to(added.dtype) * added",
        "return added",
        f"{LORA}'closed_gate_gives and ViT and full'",
    ),
    Mutant(
        "LoRA of pass 2: without its scale",
        "a, b, self.topdown_scaling[adapter_name])\n\n\ndef gate_of_input",
        "a, b, 1.0)\n\n\ndef gate_of_input",
        f"{LORA}'that_of_the_formula and ViT and full-None'",
    ),
    Mutant(
        "LoRA of pass 2: biases alone count as nothing",
        "return adapter_name in self.topdown_pass2_A or adapter_name in self.topdown_pass2_bias",
        "return adapter_name in self.topdown_pass2_A",
        f"{LORA}'biases_alone and ViT'",
    ),
    Mutant(
        "LoRA of pass 2: of blocks below the loop",
        "list(enumerate(stack.blocks))[last:]",
        "list(enumerate(stack.blocks))",
        "features/test_pass2_targets.py -k targets_are_in_the_blocks",
    ),
    Mutant(
        "LoRA of pass 2: of cross-attention, whose keys and values are kept once",
        "            if not is_cross_attention(name):\n                # PEFT takes the ends",
        "            if True:\n                # PEFT takes the ends",
        f"{LORA}encoder_decoder",
    ),
    Mutant(
        "LoRA of pass 2: a row with a closed mask is skipped",
        "        if second_pass is None:\n            return mask\n",
        "        return mask\n",
        f"{LORA}'closed_gate_are_skipped and ViT and full'",
    ),
    Mutant(
        "LoRA of pass 2: the gate of all rows for the open ones",
        "return self._replace(gate=rows_of(self.gate, rows, batch_size))",
        "return self",
        f"{LORA}'closed_gate_are_skipped and ViT and full'",
    ),
    Mutant(
        "LoRA of pass 2: rank of the config and of the file differ",
        "config.pass2_r if config.pass2_target_modules else 0)",
        "0)",
        f"{ADAPTERS}another_rank",
    ),
    Mutant(
        "LoRA of pass 2: no gradient from reentrant checkpointing",
        "*self.trained_inside(again)]",
        "]",
        f"{LORA}'gradients and ViT and full and True'",
    ),
    Mutant(
        "LoRA of pass 2: lost where the values are computed anew",
        "self.replace_values, prepend=True)",
        "self.replace_values)",
        f"{LORA}keeps_its_lora",
    ),
    Mutant(
        "LoRA of pass 2: stays on a layer that LoRA has wrapped",
        "if isinstance(hooks, MovingHooks):",
        "if isinstance(hooks, MovingHooks) and not hasattr(hooks, 'layer'):",
        f"{ADAPTERS}'either_order and Llama and TOAST'",
    ),
    Mutant(
        "LoRA of pass 2: hooks stay after unload",
        "for hooks in (*self.value_hooks.values(), *self.second_pass_hooks.values()):",
        "for hooks in self.value_hooks.values():",
        f"{ADAPTERS}'unload and ViT'",
    ),
    Mutant(
        "feedback to the output: lost where the feedback is fused",
        "return fused(features, mask) | feedback",
        "return fused(features, mask)",
        f"{OUTPUT}'fused and ViT'",
    ),
    Mutant(
        "feedback to the output: stays after unload",
        "            self.output_hook.remove()",
        "            pass",
        f"{OUTPUT}'unload and ViT'",
    ),
    Mutant(
        "feedback to the output: Lite without its scale",
        "a, b, self.topdown_scaling[adapter_name])\n\n\nclass OutputHook",
        "a, b, 1.0)\n\n\nclass OutputHook",
        f"{OUTPUT}'that_of_the_formula and ViT and lite'",
    ),
]

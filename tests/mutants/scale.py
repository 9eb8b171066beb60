"""What may go wrong where the feedback is made weaker or stronger."""

from .mutant import Mutant

SCALE = "features/test_feedback_scale.py -k "

OF_A_SCALE = [
    Mutant("feedback scale: not used", "mask = mask if alpha == 1 else alpha * mask", "pass", f"{SCALE}every_block"),
    Mutant(
        "feedback scale: without its gradient",
        "mask = mask if alpha == 1 else alpha * mask",
        "mask = mask if alpha == 1 else alpha * mask.detach()",
        f"{SCALE}gradients",
    ),
    Mutant(
        "feedback scale: of the first stack only",
        "    for of_stack in scales:\n        of_stack.update({name: alpha for",
        "    for of_stack in scales[:1]:\n        of_stack.update({name: alpha for",
        f"{SCALE}encoder_and_decoder",
    ),
    Mutant(
        "feedback scale: of all adapters",
        "of_stack.update({name: alpha for name in adapter_names if name in of_stack})",
        "of_stack.update(dict.fromkeys(of_stack, alpha))",
        f"{SCALE}each_adapter",
    ),
    Mutant(
        "feedback scale: stays after an exception",
        "    try:\n        yield\n    finally:\n        _put(scales, before)",
        "    yield\n    _put(scales, before)",
        f"{SCALE}exception",
    ),
    Mutant(
        "feedback scale: blocks replace instead of multiplying",
        "checked_scale(alpha * multiplier) for name, alpha",
        "multiplier for name, alpha",
        f"{SCALE}'exception or each_adapter'",
    ),
    Mutant(
        "feedback scale: stays when the adapter is deleted",
        '("topdown_config", "topdown_range", "topdown_identity", "topdown_feedback_scale")',
        '("topdown_config", "topdown_range", "topdown_identity")',
        f"{SCALE}each_adapter",
    ),
    Mutant(
        "feedback scale: the config does not count",
        "self.topdown_feedback_scale[adapter_name] = config.feedback_scale",
        "self.topdown_feedback_scale[adapter_name] = 1.0",
        f"{SCALE}'config or request'",
    ),
    Mutant(
        "feedback scale: rows that the mask opens run at 0",
        "opened = torch.zeros_like(mask) if is_void else self._opened(adapter_name, mask)",
        "opened = self._opened(adapter_name, mask)",
        f"{SCALE}one_forward",
    ),
    Mutant(
        "feedback scale: no gradients at 0",
        "return not torch.is_grad_enabled() and not self.topdown",
        "return not self.topdown",
        f"{SCALE}bit_for_bit",
    ),
    Mutant(
        "feedback scale: twice the bias is gone at 0",
        "not torch.is_grad_enabled() and not self.topdown_config[adapter_name].double_value_bias",
        "not torch.is_grad_enabled()",
        f"{SCALE}official_vit",
    ),
    Mutant(
        "feedback scale: any number",
        'if not is_of_type(value, float):\n        raise ValueError(\n            f"The scale',
        'if False:\n        raise ValueError(\n            f"The scale',
        f"{SCALE}refused",
    ),
]

"""What may go wrong where a prompt is given with the inputs."""

from .mutant import Mutant

GIVEN = "features/test_topdown_prompt.py -k "
FROM = "features/test_prompt_from.py -k "

OF_STEERING = [
    Mutant(
        "given prompt: not used",
        "self.topdown_prompt[adapter_name](compared, self.state.current.prompt)",
        "self.topdown_prompt[adapter_name](compared)",
        f"{GIVEN}'mask_is_the_cosine and ViT and full'",
    ),
    Mutant(
        "given prompt: that of the first row for all",
        "if prompts.dim() == 1 or len(prompts) == 1:\n            return prompts.flatten()",
        "if True:\n            return prompts.view(-1, prompts.shape[-1])[0]",
        f"{GIVEN}'mask_is_the_cosine and ViT and full'",
    ),
    Mutant(
        "given prompt: without its gradient",
        "prompts = prompts.to(features.device, torch",
        "prompts = prompts.detach().to(features.device, torch",
        f"{GIVEN}'gradients_flow and ViT and plain'",
    ),
    Mutant(
        "given prompt: repeated in the order of whole batches",
        "prompts.repeat_interleave(repeats, dim=0)",
        "prompts.repeat(repeats, 1)",
        f"{GIVEN}rows_of_beams",
    ),
    Mutant(
        "given prompt: fewer prompts than rows in a forward",
        "current.prompt = current.prompt, GivenPrompt(topdown_prompt)",
        "current.prompt = current.prompt, GivenPrompt(topdown_prompt, may_repeat=True)",
        f"{GIVEN}fewer_prompts",
    ),
    Mutant(
        "given prompt: stays after the block",
        "    try:\n        yield\n    finally:\n        current.prompt = outer",
        "    yield",
        f"{GIVEN}'block or exception'",
    ),
    Mutant(
        "given prompt: one for all threads, or never gone after a forward",
        "            return self.original(*args, **kwargs)\n        finally:\n            current.prompt = outer",
        "            return self.original(*args, **kwargs)\n        finally:\n            pass",
        f"{GIVEN}'argument or block'",
    ),
    Mutant(
        "given prompt: rounded to the adapter",
        "torch.promote_types(prompts.dtype, dtype))",
        "torch.bfloat16)",
        f"{GIVEN}'mask_is_the_cosine and ViT and full'",
    ),
    Mutant(
        "given prompt: for several stacks of blocks",
        'if len(active) != 1:\n        raise ValueError(\n            f"`{PROMPT',
        'if not active:\n        raise ValueError(\n            f"`{PROMPT',
        f"{GIVEN}encoder_and_decoder",
    ),
    Mutant(
        "given prompt: part of what stored features depend on",
        "unused = (STORED_INPUT, PROMPT_INPUT)",
        "unused = (STORED_INPUT,)",
        f"{GIVEN}stored_features",
    ),
    Mutant(
        "given prompt: the argument stays after unload",
        "        if not self.model_forward.paths:\n            self.model_forward.remove()",
        "",
        f"{GIVEN}unload",
    ),
    Mutant(
        "given prompt: `generate` stays after unload",
        "        if self.generate is not None:\n            self.generate.remove()",
        "",
        f"{GIVEN}unload",
    ),
    Mutant(
        "prompt from: the mean without normalising",
        "(F.normalize(features.flatten(1, -2), dim=-1) * weights)",
        "(features.flatten(1, -2) * weights)",
        f"{FROM}'mean_normalised and Llama and full'",
    ),
    Mutant(
        "prompt from: the features in place of what is compared",
        "raise FirstPassIsOver(features if compared is None else compared)",
        "raise FirstPassIsOver(features)",
        f"{FROM}'token_that_is_asked_for and ConvNext'",
    ),
    Mutant("prompt from: with padding", "chosen = is_own", "chosen = torch.ones_like(is_own)", f"{FROM}padding"),
    Mutant(
        "prompt from: height and width of an image swapped",
        "(x * width < right) & ((x + 1) * width > left)",
        "(x * width < bottom) & ((x + 1) * width > top)",
        f"{FROM}not_square",
    ),
    Mutant(
        "prompt from: tokens before the patches counted as patches",
        "(num_before, 0))",
        "(0, num_before))",
        f"{FROM}before_the_patches",
    ),
    Mutant(
        "prompt from: in training mode",
        "stack.enter_context(in_evaluation_mode(self.model.modules()))",
        "pass",
        f"{FROM}batch_norms",
    ),
]

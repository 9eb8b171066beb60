"""What may go wrong where both passes share the keys and values of a cache."""

from .mutant import Mutant

SHARED = "features/test_shared_cache.py -k "

OF_A_SHARED_CACHE = [
    Mutant(
        "shared cache: pass 2 goes on after pass 1 has run",
        "before.keys, before.values = layer.keys[..., :length, :], layer.values[..., :length, :]",
        "pass",
        f"{SHARED}'generation_that_opens and Llama and greedy'",
    ),
    Mutant(
        "shared cache: a static layer counts from after pass 1",
        "before.cumulative_length.copy_(length)",
        "pass",
        f"{SHARED}'generation_that_opens and Llama and static'",
    ),
    Mutant(
        "shared cache: both passes write into one static layer",
        "elif not is_dynamic:",
        "elif False:",
        f"{SHARED}'generation_that_opens and Llama and static'",
    ),
    Mutant(
        "shared cache: states that pass 1 has written into",
        "setattr(copied, name, copy.deepcopy(value))\n        elif",
        "pass\n        elif",
        f"{SHARED}other_kinds",
    ),
    Mutant(
        "shared cache: a window without what pass 1 has dropped",
        "return partial(_same, _copy_of(layer))",
        "return partial(_copy_of, layer)",
        f"{SHARED}'generation_that_opens and Mistral and greedy'",
    ),
    Mutant(
        "shared cache: pass 1 ends at feedback_from",
        "return self.index >= run.feedback_from and not run.complete",
        "return self.index >= run.feedback_from",
        f"{SHARED}'closed_generation and middle and greedy'",
    ),
    Mutant(
        "shared cache: features of the last block instead of those at feedback_from",
        "if self.index < run.feedback_from:\n            run.last",
        "if True:\n            run.last",
        f"{SHARED}'generation_that_opens and middle and greedy'",
    ),
    Mutant(
        "shared cache: not parted where pass 2 has to run",
        "            if not may_share:\n                self.part()",
        "            pass",
        f"{SHARED}both_passes_have_to_run",
    ),
    Mutant(
        "shared cache: never shared again after a reset",
        "or (may_share and _is_empty(own))",
        "",
        f"{SHARED}reset",
    ),
    Mutant(
        "shared cache: static ones on accelerators",
        "return not (is_made_for_compiling(cache) and",
        "return not (False and",
        f"{SHARED}generate_compiles",
    ),
]

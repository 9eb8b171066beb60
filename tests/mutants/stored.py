"""What may go wrong where pass 1 is stored."""

from .mutant import Mutant

NUMBERS = "features/test_stored_features.py -k "
REFUSED = "features/test_stored_features_refused.py -k "

OF_STORED_FEATURES = [
    Mutant(
        "stored: not taken",
        "        stored, self.state.current.stored = self.state.current.stored, None",
        "        stored = None",
        f"{NUMBERS}'those_of_two_passes and late'",
    ),
    Mutant("stored: of another adapter", "if origin != self.origin:", "if False:", f"{REFUSED}another_adapter"),
    Mutant(
        "stored: something below is trained in a step",
        "if self.features_are_trained(stored.origin, kwargs):",
        "if False:",
        f"{REFUSED}refused_in_a_step",
    ),
    Mutant(
        "stored: the norm that the features pass is trained",
        "return (norm is not None and is_trained(norm)) or self._first",
        "return self._first",
        f"{REFUSED}'refused_before and norm'",
    ),
    Mutant(
        "stored: hidden states that are asked for are those of one block",
        "or is_recording() or not (recorded is None or recorded is False):",
        "or is_recording():",
        f"{NUMBERS}asked_for",
    ),
    Mutant(
        "stored: lower blocks skipped where nothing is stored of them",
        "if stored.hidden_states is None or is_rec",
        "if is_rec",
        f"{NUMBERS}more_than_hidden_states",
    ),
    Mutant(
        "stored: a cache is filled by pass 2 alone",
        'return {**kwargs, "use_cache": False} if "use_cache" in self.argument_names else kwargs',
        "return kwargs",
        f"{NUMBERS}no_cache",
    ),
    Mutant("stored: left behind", "            current.stored = outer", "            pass", f"{NUMBERS}disabled"),
    Mutant(
        "stored: not in the signature",
        "parameters=[*parameters[:index], added, *parameters[index:]]",
        "parameters=parameters",
        f"{NUMBERS}trainer",
    ),
    Mutant(
        "stored: unload leaves the model's forward",
        "if self.stored_input is not None:  # it",
        "if False:  # it",
        f"{NUMBERS}unload",
    ),
    Mutant(
        "stored: other inputs",
        "if checksum(inputs, position) != given.stored.checksum:",
        "if False:",
        f"{REFUSED}other_pixels",
    ),
    Mutant(
        "stored: padding is taken for tokens",
        "    if mask is not None and mask.shape[1] == num_tokens:",
        "    if False:",
        f"{NUMBERS}padded_as",
    ),
    Mutant(
        "stored: features that depend on padding",
        "if depends or self._outputs",
        "if self._outputs",
        f"{REFUSED}changes_the_features",
    ),
    Mutant(
        "stored: outputs that depend on padding",
        "if depends or self._outputs_that_differ(self._batch(rows), computed):",
        "if depends:",
        f"{REFUSED}outputs_that_depend",
    ),
    Mutant(
        "stored: the loss depends on padding",
        "    if (~mask[:, :-1] & mask[:, 1:] & (labels[:, 1:] != -100)).any():",
        "    if False:",
        f"{REFUSED}loss_that_depends",
    ),
    Mutant(
        "stored: another base model",
        '"sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),',
        '"sha256": "",',
        f"{REFUSED}'something_else and base'",
    ),
    Mutant(
        "stored: the hash counts what is not used",
        "        unused += [part for part in self.model.modules() if isinstance(part, AuxiliaryTrainingWrapper)]\n",
        "",
        f"{REFUSED}new_head",
    ),
    Mutant(
        "stored: an interrupted call starts anew",
        "    finally:\n        shards.flush()",
        "    finally:\n        pass",
        f"{REFUSED}interrupted",
    ),
]

"""What may go wrong with other families, and with all that a method of PEFT does besides a forward."""

from .mutant import Mutant

START = "contract/test_start.py -k 'starts_as_the_base_model and "

AROUND_IT = [
    # ------------------------------------------------------------------------- ConvNets and hierarchies
    Mutant(
        "ConvNet: running statistics of both passes",
        "with running_statistics_kept(self.module) if runs_again else nullcontext():",
        "with nullcontext():",
        f"{START}ResNetFor'",
    ),
    Mutant(
        "ConvNet: height and width exchanged",
        "F.pad(z, (0, missing[1], 0, missing[0]))",
        "F.pad(z, (0, missing[0], 0, missing[1]))",
        "families/test_convnets.py -k 'output_is_that_of_the_formulas and ResNetFor'",
    ),
    Mutant(
        "ConvNet: start of the chain not scaled",
        "linear1[channels, channels % self.out_features] = self._identity_scale",
        "linear1[channels, channels % self.out_features] = 1.0",
        "families/test_convnets.py -k start_of_the_chain",
    ),
    Mutant(
        "ConvNet: another stride than that of the modules",
        "if max(map(abs, missing)) > self.stride:",
        "if False:",
        "families/test_convnets.py -k stride",
    ),
    Mutant(
        "hierarchy: windows shifted the other way",
        "shifts=(-shift, -shift)",
        "shifts=(shift, shift)",
        "families/test_hierarchies.py -k 'only_values and SwinFor and full'",
    ),
    Mutant(
        "hierarchy: windows padded the other way",
        "(0, 0, 0, -width % size, 0, -height % size)",
        "(0, 0, 0, -height % size, 0, -width % size)",
        "families/test_hierarchies.py -k 'only_values and SwinFor and full'",
    ),
    Mutant(
        "hierarchy: rows and columns of the four tokens exchanged",
        "z.unflatten(-1, (_MERGED, _MERGED, -1))",
        "z.unflatten(-1, (_MERGED, _MERGED, -1)).transpose(3, 4)",
        "families/test_hierarchies.py -k formulas",
    ),
    Mutant(
        "hierarchy: largest instead of mean over a patch",
        "F.avg_pool2d(td.movedim(-1, 1), ratio)",
        "F.max_pool2d(td.movedim(-1, 1), ratio)",
        "families/test_hierarchies.py -k 'only_values and Segformer and full'",
    ),
    Mutant(
        "hierarchy: features without the final norm",
        "return in_last_stage and super()._normalizes(adapter)",
        "return False",
        "families/test_hierarchies.py -k 'formulas or norm'",
    ),
    Mutant(
        "hierarchy: one layer for the start and the middle of a chain",
        'return f"{index}_start" if is_start else str(index)',
        "return str(index)",
        "families/test_hierarchies.py -k different_stages",
    ),
    # ------------------------------------------------------------------ injection, switching, saving, loading
    Mutant(
        "delete: layers disagree about what is active",
        "        if was_active and self.active_adapter:\n            self.set_adapter(self.active_adapter)\n",
        "",
        "features/test_peft_contract.py -k deleting",
    ),
    Mutant(
        "injection: not undone when it fails",
        "snapshot.restore()\n        raise",
        "raise",
        "features/test_errors.py -k middle_of_the_injection",
    ),
    Mutant(
        "injection: requires_grad not put back",
        "parameter.requires_grad = requires_grad",
        "pass",
        "features/test_errors.py -k with_a_config_given",
    ),
    Mutant(
        "injection: an adapter of the same name stays",
        "            _drop_adapter(model, adapter_name)\n            super()",
        "            super()",
        "features/test_peft_contract.py -k adapted_twice",
    ),
    Mutant(
        "identity: a copied adapter counts as the same",
        "return AdapterIdentity()",
        "return self",
        "features/test_caches.py -k another_model_refuses",
    ),
    Mutant(
        "loading: of another base model",
        "if different and config.is_of_saved_adapter:",
        "if False:",
        "features/test_errors.py -k 'another_base_model and depth'",
    ),
    Mutant(
        "loading: weights that are not finite",
        "return [] if finite.all() else [",
        "return [] if True else [",
        "features/test_errors.py -k 'tampered_weights and infinite'",
    ),
    Mutant(
        "loading: weights of another dtype",
        "if tensor.dtype not in dtypes or tensor.layout != torch.strided:",
        "if tensor.layout != torch.strided:",
        "features/test_errors.py -k 'tampered_weights and int8'",
    ),
    Mutant(
        "loading: a failed one is not undone",
        "if adapter_name in loads and loads[adapter_name].undo() and len(configs) > 1:",
        "if adapter_name in loads and len(configs) > 1:",
        "features/test_errors.py -k with_a_config_given",
    ),
    Mutant(
        "loading: rank of the config and of the file differ",
        "if rank > 0 and ranks != {(rank,)}:",
        "if False:",
        "features/test_unreadable_adapters.py features/test_damaged_adapters.py",
    ),
    Mutant(
        "loading: parameters of other parts taken for the adapter's",
        r'rf"\.topdown_\w+\.{re.escape(adapter_name)}\."',
        r'rf"\.{re.escape(adapter_name)}\."',
        "features/test_saving.py -k any_name",
    ),
    # --------------------------------------------------------------------- start from another adapter, from data
    Mutant(
        "pretrained: another alpha",
        "ratio = saved.lora_alpha / config.lora_alpha",
        "ratio = 1.0",
        "features/test_pretrained_feedback.py -k 'same_feedback and ViT'",
    ),
    Mutant(
        "pretrained: product of the factors not scaled",
        "fixed + saved.lora_alpha / saved.r * product",
        "fixed + product",
        "features/test_pretrained_feedback.py -k 'same_feedback and ViT'",
    ),
    Mutant(
        "pretrained: rounded on the way",
        "copy_weights(self.model, load.copied)",
        "pass",
        "features/test_pretrained_feedback.py -k low_precision",
    ),
    Mutant(
        "pretrained: of another meaning",
        "if trained_with != given:",
        "if False:",
        "features/test_pretrained_feedback.py -k something_else",
    ),
    Mutant(
        "base feedback: not pinned to its commit",
        "config.base_feedback_revision = commit or given.pretrained_revision",
        "config.base_feedback_revision = given.pretrained_revision",
        "features/test_pretrained_feedback.py -k on_the_hub",
    ),
    Mutant(
        "base feedback: changed matrices",
        "if not found or sha256_of(found) != config.base_feedback_sha256:",
        "if not found:",
        "features/test_base_feedback.py -k right_matrices",
    ),
    Mutant(
        "base feedback: a downloaded file names a folder",
        "if config.reference_in_file != (path, subfolder):",
        "if True:",
        "features/test_base_feedback.py -k names_no_folder",
    ),
    Mutant(
        "initialization: features not normalised",
        "F.normalize(compared, dim=-1).sum(0)",
        "compared.sum(0)",
        "features/test_initialization.py -k minimum",
    ),
    Mutant(
        "initialization: padding counts",
        "x = x.flatten(1, -2)[own.to(x.device)]",
        "pass",
        "features/test_initialization.py -k padding",
    ),
    Mutant(
        "initialization: not the input of the block",
        "output.T @ (hidden_states - output)",
        "output.T @ hidden_states",
        "features/test_initialization.py -k minimum",
    ),
    Mutant(
        "prompt: none for a new adapter with a saved config",
        "elif not is_saved or not config.inference_mode:",
        "elif not is_saved:",
        "features/test_unreadable_adapters.py -k config_of_another_one",
    ),
    Mutant(
        "prompt: turned the wrong way",
        "elif open_share < 0.5:",
        "elif open_share > 0.5:",
        "features/test_prompt_start.py -k official_prompt",
    ),
    Mutant(
        "prompt: forwards stay without pass 2 after the start",
        "        current.without_second_pass = False\n",
        "        pass\n",
        "features/test_prompt_start.py -k one_pass",
    ),
    Mutant(
        "prompt: pass 1 that ends a forward has skipped blocks",
        "run.complete = self.state.current.without_second_pass and",
        "run.complete = False and",
        "features/test_prompt_start.py -k one_pass",
    ),
    Mutant(
        "prompt: another adapter stays active after the start",
        "part._active_adapter, part._disable_adapters, part.state.current = active, disabled, current",
        "part.state.current = current",
        "features/test_prompt_start.py -k second_adapter",
    ),
    Mutant(
        "statistics: of the first and not of the last tokens",
        "(last + 1 - num_tokens).clamp(min=0)",
        "last * 0",
        "features/test_feedback_statistics.py -k cached_tokens",
    ),
    Mutant(
        "callback: warns at every log",
        "self.has_warned = True",
        "pass",
        "features/test_feedback_statistics.py -k warns_once",
    ),
    # --------------------------------------------------------------------------------- options, finding, the card
    Mutant(
        "config: an empty range",
        "if not 0 <= last < first <= num_blocks:",
        "if not 0 <= last <= first <= num_blocks:",
        "features/test_errors.py -k 'does_not_fit_the_model and feedback_from'",
    ),
    Mutant(
        "config: a bool for a number",
        "return not isinstance(value, bool) and abs(value)",
        "return abs(value)",
        "features/test_config.py -k senseless",
    ),
    Mutant(
        "finding: several layers of a block",
        "if len(in_block) > 1:",
        "if False:",
        "features/test_errors.py -k 'does_not_fit_the_model and q_proj'",
    ),
    Mutant(
        "finding: a fused projection of an unknown order",
        "if fused and not (architecture and architecture.fused):",
        "if False:",
        "features/test_errors.py -k projection_of_more_than_values",
    ),
    Mutant(
        "finding: `layers_to_transform` is not asked",
        "(chosen is None or index in chosen)",
        "True",
        "features/test_finding.py -k layer",
    ),
    Mutant(
        "finding: `modules_to_save` inside of another match",
        "        if nested:\n",
        "        if False:\n",
        "features/test_errors.py -k inside_of_each_other",
    ),
    Mutant(
        "card: our part is added at every save",
        "if begin and end else",
        "if False else",
        "features/test_card.py -k saving_again",
    ),
    Mutant(
        "official checkpoint: merged factors added again",
        "if _looks_merged(tensors, products, scaling):",
        "if False:",
        "golden/test_convert.py -k merged",
    ),
]

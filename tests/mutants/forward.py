"""What may go wrong in a forward of a transformer and in its gradient."""

from .mutant import Mutant

GOLDEN = "golden/test_golden.py -k "
FORMULAS = "contract/test_feedback.py -k 'formulas and ViT'"
START = "contract/test_start.py -k 'starts_as_the_base_model and "
FUSED = "features/test_fused_feedback.py -k "
GENERATION = "contract/test_generation.py -k "

IN_A_FORWARD = [
    # ------------------------------------------------------------------------------------- the mathematics
    Mutant("mask: no clamp", "keepdim=True).clamp(0, 1).to(", "keepdim=True).to(", f"{GOLDEN}vit_forward"),
    Mutant("mask: clamped above zero only at one", ".clamp(0, 1).to(", ".clamp(-1, 1).to(", f"{GOLDEN}vit_forward"),
    Mutant(
        "mask: norms in the adapter's low precision",
        "dtype = torch.promote_types(prompt.dtype, torch.float32)",
        "dtype = prompt.dtype",
        "features/test_mixed_precision.py -k features_of_zeros",
    ),
    Mutant("mask: not applied", "return transform(mask * x)", "return transform(x)", FORMULAS),
    Mutant("transform: from the left", "return x @ self.weight", "return x @ self.weight.T", FORMULAS),
    Mutant(
        "prompt: random one of the official size",
        "std=0.02 if config.init_weights else 1.0",
        "std=1.0",
        "features/test_prompt_start.py -k random_option",
    ),
    Mutant(
        "layer: linear2 of what comes from above",
        "z = linear1(z)\n    return z, linear2(z)",
        "return linear1(z), linear2(z)",
        FORMULAS,
    ),
    Mutant("layer: linear2 not zero at the start", "nn.init.zeros_(linear2)", "nn.init.eye_(linear2)", f"{START}ViT'"),
    Mutant(
        "Lite: B not zero at the start",
        'nn.init.zeros_(getattr(self, f"{name}_B")[adapter_name].weight)',
        'nn.init.ones_(getattr(self, f"{name}_B")[adapter_name].weight)',
        f"{START}ViT and lite'",
    ),
    Mutant("Lite: not scaled", "return b(a(z)) * scaling", "return b(a(z))", f"{GOLDEN}vit_forward"),
    Mutant(
        "Lite: no dropout",
        "self.topdown_dropout[adapter_name])\n        return low_rank(dropout(z) if dropout.p > 0",
        "self.topdown_dropout[adapter_name])\n        return low_rank(z if dropout.p > 0",
        "features/test_dropout.py -k dropout_of_the_factors",
    ),
    Mutant(
        "Lite: fixed matrices are trained",
        'frozen=("topdown_linear1", "topdown_linear2") if r > 0 else ()',
        "frozen=()",
        "features/test_peft_contract.py -k 'trainable_parts and nothing'",
    ),
    Mutant(
        "chain: from the bottom up",
        "return sorted(chain, key=itemgetter(0), reverse=True)",
        "return sorted(chain, key=itemgetter(0))",
        FORMULAS,
    ),
    Mutant(
        "features: without the final norm",
        "return self._after_final_norm(features) if self._normalizes(adapter) else features, None",
        "return features, None",
        FORMULAS,
    ),
    # -------------------------------------------------------------------------------------- the two passes
    Mutant(
        "pass 1: runs one block too many",
        "return self.index >= run.feedback_from",
        "return self.index > run.feedback_from",
        "contract/test_feedback.py -k 'skipped and ViT'",
    ),
    Mutant(
        "pass 2: skips the lower blocks also where they are recorded",
        "return self.index < run.feedback_to and not run.repeat_lower_blocks",
        "return self.index < run.feedback_to",
        "contract/test_feedback.py -k 'recorded and ViT'",
    ),
    Mutant(
        "pass 2: dropout of the lower blocks is left out",
        "runs_again = is_random or (self.records_inside",
        "runs_again = (self.records_inside",
        "features/test_dropout.py -k 'no_op_adapter_trains and ViT'",
    ),
    Mutant(
        "pass 1: without a graph where something below is trained",
        "with nullcontext() if needs_graph else torch.no_grad(),",
        "with torch.no_grad(),",
        "features/test_checkpointing.py -k 'trained_embeddings and ViT and None'",
    ),
    Mutant(
        "pass 1: a graph of a frozen model",
        "torch.is_grad_enabled() and self._first_pass_is_trained(run.feedback_from, kwargs)",
        "torch.is_grad_enabled()",
        "features/test_checkpointing.py -k 'only_checkpointing_wants'",
    ),
    Mutant(
        "pass 1: inputs that want a gradient do not count",
        "if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):",
        "if False:",
        "features/test_checkpointing.py -k gradients_of_inputs",
    ),
    Mutant(
        "pass 1: blocks that are not called are no error",
        "if run.last_output is None:",
        "if False:",
        "features/test_wiring.py -k does_not_call",
    ),
    Mutant(
        "pass 2: a value projection that is not called is no error",
        "if self.index in run.feedback and self.index not in run.steered:",
        "if False:",
        "features/test_wiring.py -k does_not_call",
    ),
    Mutant(
        "state: a block by itself runs without its feedback",
        "if self.path.active_adapter is not None:\n            raise RuntimeError(",
        "if False:\n            raise RuntimeError(",
        "features/test_forward.py -k single_block",
    ),
    Mutant(
        "state: not restored after a forward inside of a forward",
        "finally:\n            self.state.current.run = outer",
        "finally:\n            self.state.current.run = None",
        "features/test_forward.py -k base_forward_inside",
    ),
    Mutant(
        "state: shared by all threads",
        "class ThreadState(threading.local):",
        "class ThreadState:",
        "features/test_forward.py -k another_thread",
    ),
    Mutant(
        "unload: the forward of accelerate is lost",
        "attributes[name] = self.previous",
        "pass",
        "features/test_peft_contract.py -k hooks_of_accelerate",
    ),
    Mutant(
        "recording: pass 1 is in the record",
        "            _collector.set(None)",
        "            pass",
        "families/test_unsuitable_models.py -k hidden_states_of_pass_2",
    ),
    # --------------------------------------------------------------------------- checkpointing and dropout
    Mutant(
        "checkpoint: feedback gets no gradient",
        "given = [*again.feedback.values(), ",
        "given = [*(td.detach() for td in again.feedback.values()), ",
        "contract/test_gradients.py -k 'checkpointing and ViT'",
    ),
    Mutant(
        "checkpoint: the running state is lost",
        "finally:\n            self.state.current.run = previous",
        "finally:\n            self.state.current.run = None",
        "contract/test_gradients.py -k 'checkpointing and ViT'",
    ),
    Mutant(
        "checkpoint: dropout in pass 1 when it runs again",
        "return dropout_off(*(block.module for block in self.blocks)) if off else nullcontext()",
        "return nullcontext()",
        "features/test_dropout.py -k 'first_pass_in_the_graph and ViT'",
    ),
    Mutant(
        "checkpoint: function left wrapped after unload",
        "setattr(module, _FUNCTION, checkpoint.checkpoint)",
        "pass",
        "features/test_checkpointing.py -k unload",
    ),
    Mutant(
        "dropout: uses up random numbers in pass 1",
        "else torch.random.fork_rng(devices=[]):",
        "else nullcontext():",
        "features/test_dropout.py -k uses_up_no_random_numbers",
    ),
    Mutant(
        "dropout: batch norms in evaluation mode in pass 1",
        "for module in modules_inside(root) if not isinstance(module, _NormBase)]",
        "for module in modules_inside(root)]",
        "features/test_dropout.py",
    ),
    Mutant(
        "training: something trained below the feedback is not seen",
        "parameter.requires_grad:\n                return True",
        "parameter.requires_grad:\n                return False",
        "features/test_checkpointing.py -k 'trained_embeddings and ViT and None'",
    ),
    Mutant(
        "closed rows: an open one gets pass 1",
        "return put_rows(output, rows, self.original(**arguments))",
        "return output",
        "features/test_closed_rows.py -k open_rows",
    ),
    Mutant(
        "closed rows: skipped in training",
        "if torch.is_grad_enabled() or torch.compiler.is_compiling() or",
        "if torch.compiler.is_compiling() or",
        "features/test_closed_rows.py -k training",
    ),
    Mutant(
        "closed rows: outputs below the loop only are kept",
        "            run.kept_below = run.feedback_from\n",
        "            run.kept_below = run.feedback_to\n",
        "features/test_closed_rows.py -k 'closed_batch and ViT'",
    ),
    # ----------------------------------------------------------------------------------- value projections
    Mutant(
        "values: the rows of the queries instead",
        "return weight.unflatten(0, (self.parts, -1))[:, -self.columns :].flatten(0, 1)",
        "return weight.unflatten(0, (self.parts, -1))[:, : self.columns].flatten(0, 1)",
        "families/test_transformers.py -k running_it_again",
    ),
    Mutant(
        "fused: queries and keys see the feedback",
        "columns = [of_input[..., : -self.columns]",
        "columns = [of_steered[..., : -self.columns]",
        "families/test_transformers.py -k 'fused and GPT2'",
    ),
    Mutant(
        "fused: heads side by side are taken for one",
        "tensor.unflatten(-1, (self.parts, -1))",
        "tensor.unflatten(-1, (1, -1))",
        "families/test_transformers.py -k 'fused and NeoX'",
    ),
    Mutant(
        "double bias: not added",
        "return value + self._bias(module, args[0])",
        "return value",
        f"{GOLDEN}vit_forward",
    ),
    Mutant(
        "double bias: not added to a fused projection",
        "steered = steered + self._bias(module, hidden_states)",
        "pass",
        "families/test_transformers.py -k fused",
    ),
    Mutant(
        "values: broadcast feedback is no error",
        "if td.shape != expected:",
        "if False:",
        "families/test_unsuitable_models.py -k 'first_forward and pooled'",
    ),
    Mutant(
        "values: feedback not cast to the block's dtype",
        "return td.to(device=hidden_states.device, dtype=hidden_states.dtype)",
        "return td",
        "features/test_mixed_precision.py -k 'training_steps and ViT and bfloat16'",
    ),
    Mutant(
        "values: hooks stay on a layer that LoRA wraps",
        "hooks.move_to(module)",
        "pass",
        "features/test_lora.py -k 'either_order and ViT'",
    ),
    # ------------------------------------------------------------------------------------------- the cache
    Mutant(
        "cache: a layer too few for pass 1",
        "layers[feedback_to:feedback_from]\n",
        "layers[feedback_to : feedback_from - 1]\n",
        f"{GENERATION}Llama",
    ),
    Mutant(
        "cache: pass 2 begins a layer too high",
        "lower + cache.layers[passes.owner.feedback_to : passes.num_layers]",
        "lower + cache.layers[passes.owner.feedback_to + 1 : passes.num_layers]",
        f"{GENERATION}Llama",
    ),
    Mutant(
        "cache: a counter shared by both passes",
        "snapshot.cumulative_length = counter.clone()",
        "pass",
        "features/test_generation.py features/test_caches.py -k static",
    ),
    Mutant(
        "cache: continued without the adapter after unload",
        "cache.update = update_of_one_pass",
        "pass",
        "features/test_caches.py -k 'unloaded_model_refuses and Llama'",
    ),
    Mutant(
        "cache: continued by another adapter of the same name",
        "passes.owner != owner",
        "passes.owner.adapter_name != owner.adapter_name",
        "features/test_caches.py -k another_model_refuses",
    ),
    Mutant(
        "cache: filled with the adapter, used without",
        'if not _is_empty(cache):\n            raise ValueError(\n                f"This cache was filled with',
        'if False:\n            raise ValueError(\n                f"This cache was filled with',
        "features/test_generation.py -k 'adapter_is_disabled and Llama'",
    ),
    Mutant(
        "cache: filled without the adapter, used with it",
        "if not _is_empty(cache):\n        raise",
        "if False:\n        raise",
        "features/test_generation.py -k 'base_model_is_refused and Llama'",
    ),
    Mutant(
        "cache: the caller gets that of pass 2",
        "output[name] = self._callers(item)",
        "pass",
        "features/test_generation.py -k 'callers_cache and Llama'",
    ),
    Mutant(
        "cache: the caller gets that of pass 2 inside of an encoder-decoder's",
        "item.self_attention_cache = self.cache",
        "pass",
        "families/test_transformers.py -k cross_attention",
    ),
    Mutant(
        "cache: pages of continuous batching",
        "if any(isinstance(value, PagedAttentionCache) for value in kwargs.values()):",
        "if False:",
        "features/test_caches.py -k continuous_batching",
    ),
    # -------------------------------------------------------------------------------- the variational loss
    Mutant(
        "variational loss: trains more than linear1",
        "to_device_of(layer, x.detach())",
        "to_device_of(layer, x)",
        "features/test_variational_loss.py -k linear1_only",
    ),
    Mutant(
        "variational loss: not weighted in accumulation",
        "return labels.ne(-100).sum() / num_items",
        "return 1.0",
        "features/test_variational_loss.py -k 'accumulation and Llama'",
    ),
    Mutant(
        "variational loss: not a mean over the channels",
        "(mask.sum() * squares.shape[-1])",
        "mask.sum()",
        "features/test_variational_loss.py -k padding",
    ),
    Mutant(
        "variational loss: forgotten by an evaluation",
        "        if self.module.training:\n            self._expect_losses()",
        "        if True:\n            self._expect_losses()",
        "features/test_variational_loss.py -k in_between",
    ),
    Mutant(
        "variational loss: forgotten by a forward of the base model",
        "            if path.active_adapters:\n                forget_variational_loss(path.state.current)",
        "            if True:\n                forget_variational_loss(path.state.current)",
        "features/test_variational_loss.py -k in_between",
    ),
    Mutant(
        "variational loss: that of a forward whose loss nobody took stays",
        "                forget_variational_loss(path.state.current)\n",
        "",
        "features/test_variational_loss.py -k outside_of_the_model",
    ),
    Mutant(
        "variational loss: only of the last backbone",
        "losses = [part for part in (current.variational_loss, loss) if part is not None]",
        "losses = [loss]",
        "features/test_variational_loss.py -k twice",
    ),
    Mutant(
        "variational loss: adds up where the backbone is called past the model",
        "if not current.model_runs:",
        "if False:",
        "features/test_variational_loss.py -k past_the_forward",
    ),
    Mutant(
        "variational loss: that of a model which ran before is added",
        "current.model_runs = False\n",
        "pass\n",
        "features/test_variational_loss.py -k past_the_forward",
    ),
    Mutant(
        "NEFTune: its noise is in pass 1",
        " or _NEFTUNE in module.__dict__",
        "",
        "features/test_dropout.py -k neftune",
    ),
    Mutant(
        "inputs of the model are left out where its forward is another one",
        "if PROMPT_INPUT in kwargs or STORED_INPUT in kwargs:",
        "if False:",
        "features/test_topdown_prompt.py -k another_library",
    ),
    Mutant(
        "variational loss: of a stage's input with the feedback",
        "self.reconstruct(run, run.inputs[self.stage], output)",
        "self.reconstruct(run, hidden_states, output)",
        f"{GOLDEN}'variational_loss and convnext'",
    ),
    # ------------------------------------------------------------------------------------- fused feedback
    Mutant(
        "fused: without the bias that the values have",
        "times = int(double_bias) + int(hooks.columns is None)",
        "times = int(double_bias)",
        f"{FUSED}'same_values and ViT'",
    ),
    Mutant(
        "fused: double bias added once",
        "times = int(double_bias) + int(hooks.columns is None)",
        "times = int(hooks.columns is None)",
        f"{FUSED}'all_options and double'",
    ),
    Mutant(
        "fused: without scaling", "return a, layer.topdown_scaling[adapter_name] * b", "return a, b", f"{FUSED}lite"
    ),
    Mutant(
        "fused: changed weights are not noticed",
        "return self._versions() != self.versions",
        "return False",
        f"{FUSED}changed_weights",
    ),
    Mutant(
        "fused: another layer is not noticed", "if self.module is not self.folded:", "if False:", f"{FUSED}lora_on"
    ),
]

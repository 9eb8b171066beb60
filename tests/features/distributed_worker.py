"""One of two processes: trains every scenario under each kind of parallelism and saves adapters and outputs.

Started by `test_distributed.py` as `torchrun --nproc_per_node 2 -m tests.features.distributed_worker FOLDER`.
"""

import itertools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from toast_peft import fit_gate, store_features

from ..helpers import blocks_of, steered
from ..zoo import VARIANTS, inputs_of, tiny_model

KINDS = ("ddp", "fully_shard", "accelerate-fsdp2")  # the last one changes what accelerate does from then on
HEADS = {tf.ViTForImageClassification: "classifier", tf.LlamaForCausalLM: "lm_head"}
# Options of the adapter, and `use_reentrant` of gradient checkpointing (None: no checkpointing).
SCENARIOS = {
    "full": ({}, None),
    "lite": (VARIANTS["lite"], None),
    "middle": (VARIANTS["middle"], None),
    "full, non-reentrant": ({}, False),
    "full, reentrant": ({}, True),
    "lite, reentrant": (VARIANTS["lite"], True),
    "head": ({"modules_to_save": ["head"]}, None),
    "stored": ({"feedback_to": 2}, None),  # pass 1, by the first process
    "pre-tuning": ({"variational_weight": 0.1}, None),  # with more, three steps diverge
    "gated": ({"gate": "sequence", "feedback_to_output": True, "pass2_target_modules": "all-linear"}, None),
}
# All of a language model; of an image model those in which the order of the passes and their graphs differ.
RUNS = [(tf.LlamaForCausalLM, scenario) for scenario in SCENARIOS]
RUNS += [(tf.ViTForImageClassification, scenario) for scenario in ("middle", "full, reentrant", "head", "stored")]
BATCH_SIZE = 4


def scenario_base(model_class: type, scenario: str) -> torch.nn.Module:
    """The base model of a scenario; of two blocks where the passes go over all."""
    ranges = {"feedback_from", "feedback_to"} & SCENARIOS[scenario][0].keys()
    return tiny_model(model_class, tie_word_embeddings=False, num_hidden_layers=4 if ranges else 2)


def scenario_model(model_class: type, scenario: str) -> PeftModel:
    """The model of a scenario before training."""
    options, use_reentrant = SCENARIOS[scenario]
    if "modules_to_save" in options:
        options = {"modules_to_save": [HEADS[model_class]]}
    model = steered(scenario_base(model_class, scenario), **options).train()
    if "gate" in options:
        inputs = inputs_of(model, BATCH_SIZE)
        target, reference = ({name: x[rows] for name, x in inputs.items()} for rows in (slice(1, 3), slice(3, 4)))
        fit_gate(model, [target], [reference])  # open for rows of both processes
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def scenario_inputs(model: PeftModel) -> dict[str, torch.Tensor]:
    """Four rows; for pre-tuning with labels, as the model adds the variational loss to its own."""
    inputs = inputs_of(model, BATCH_SIZE)
    if model.active_peft_config.variational_weight == 0:
        return inputs
    return inputs | {"labels": inputs.get("input_ids", torch.arange(BATCH_SIZE) % 2)}


def with_stored_features(model: PeftModel, inputs: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The inputs and what pass 1 makes of them."""
    rows = [{name: x[i] for name, x in inputs.items()} for i in range(BATCH_SIZE)]
    stored = store_features(model, rows, folder)
    return stored.collate([stored[i] for i in range(BATCH_SIZE)])


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD, as Adam would hide a wrong scale of the gradients."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> None:
    """Three steps on a loss that is a mean over the rows, so that the mean over the processes is that of all rows."""
    for _ in range(3):
        outputs = model(**inputs)
        loss = outputs.loss if "labels" in inputs else outputs.logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shard_by_hand(model: PeftModel) -> PeftModel:
    """FSDP2 without accelerate: each block and the root."""
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def use_fsdp_plugin(accelerator: Accelerator, model: PeftModel) -> None:
    """Let accelerate prepare models with FSDP2. It offers this on accelerators only, but its code runs on CPU."""
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(blocks_of(model)[0]).__name__],
    )


def prepare(accelerator: Accelerator, kind: str, model: PeftModel) -> tuple[Any, torch.optim.Optimizer]:
    """The model and its optimizer under one kind of parallelism."""
    if kind == "fully_shard":
        model = shard_by_hand(model)
        return model, optimizer_of(model)
    if kind == "accelerate-fsdp2":
        use_fsdp_plugin(accelerator, model)
    return accelerator.prepare(model, optimizer_of(model))


def full_state_dict(accelerator: Accelerator, kind: str, model: Any) -> dict[str, torch.Tensor]:
    """All weights, whole; on the first process only where they were sharded."""
    if kind == "fully_shard":
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return accelerator.get_state_dict(model)


def run_scenario(accelerator: Accelerator, kind: str, model_class: type, scenario: str, folder: Path) -> None:
    """Train on half of the rows; save the adapter, and the output for all rows."""
    model = scenario_model(model_class, scenario)
    all_rows = scenario_inputs(model)
    if scenario == "stored":
        all_rows = with_stored_features(model, all_rows, folder / "features")
    model, optimizer = prepare(accelerator, kind, model)
    train(model, optimizer, {name: x[accelerator.process_index :: 2] for name, x in all_rows.items()})
    with torch.no_grad():
        output = model.eval()(**all_rows).logits
    weights = full_state_dict(accelerator, kind, model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
        torch.save(output, folder / "output.pt")
    accelerator.wait_for_everyone()


def main(folder: Path) -> None:
    """Run all scenarios of all kinds in one process group."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    assert accelerator.num_processes == 2
    for kind, (model_class, scenario) in itertools.product(KINDS, RUNS):
        print(f"{kind}, {model_class.__name__}, {scenario}", flush=True)
        run_scenario(accelerator, kind, model_class, scenario, folder / kind / model_class.__name__ / scenario)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

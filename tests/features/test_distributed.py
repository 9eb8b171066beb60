"""Two processes on CPU train to the same adapter as one, and save one ordinary adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from peft import PeftModel

from ..helpers import assert_same, output_of
from ..zoo import inputs_of
from .distributed_worker import (
    BATCH_SIZE,
    KINDS,
    RUNS,
    optimizer_of,
    scenario_base,
    scenario_inputs,
    scenario_model,
    train,
)

ROOT = Path(__file__).parents[2]
EXAMPLE_CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """All scenarios of all kinds in one run of two processes, as importing everything twice takes longest."""
    train_with_two_processes(tmp_path)
    for model_class, scenario in RUNS:
        folders = [tmp_path / kind / model_class.__name__ / scenario for kind in KINDS]
        assert_trained_as_by_one_process(model_class, scenario, folders)


def train_with_two_processes(folder: Path) -> None:
    # --multi_gpu means several processes, here on CPU (--cpu would need MPI for them); port 0 is any free one.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["--module", "tests.features.distributed_worker", str(folder)]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=480,
    )
    assert run.returncode == 0, run.stdout[-6000:]


def assert_trained_as_by_one_process(model_class: type, scenario: str, folders: list[Path]) -> None:
    model = scenario_model(model_class, scenario)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer_of(model), scenario_inputs(model))
    for folder in folders:
        loaded = PeftModel.from_pretrained(scenario_base(model_class, scenario), folder, is_trainable=True).eval()
        assert before.keys() == {name for name, p in loaded.named_parameters() if p.requires_grad}
        for name, start in before.items():
            expected, where = model.get_parameter(name), f"{folder}: {name}"
            assert not torch.equal(expected, start), where
            assert_same(loaded.get_parameter(name), expected, where)
        # What the two processes computed with these weights, not only what they saved.
        output = torch.load(folder / "output.pt", weights_only=True)
        assert_same(output_of(loaded, inputs_of(loaded, BATCH_SIZE)), output)


@pytest.mark.parametrize("path", EXAMPLE_CONFIGS, ids=lambda path: path.stem)
def test_example_configs_are_read_by_accelerate(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(yaml_file=path)
    assert config.num_processes > 1
    if path.stem == "fsdp2":
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == 3


def test_both_example_configs_are_there() -> None:
    assert [path.stem for path in EXAMPLE_CONFIGS] == ["deepspeed_zero3", "fsdp2"]

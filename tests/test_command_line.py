"""The command line: what the page about it shows runs, and errors are one sentence."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from typer.testing import CliRunner, Result

from toast_peft.commands import app as command_line

from .golden.test_golden import Golden
from .helpers import adapted, add_noise, steered
from .zoo import tiny_model

PAGE = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"<!-- runs -->\n```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page names: a base model, an adapter with a new head, an image, an official checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(tf.ViTForImageClassification).save_pretrained(folder / "my-base")
    tf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "my-base")
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    base = tf.ViTForImageClassification.from_pretrained(folder / "my-base", **options)
    steered(base, r=4, modules_to_save=["classifier"]).save_pretrained(folder / "my-adapter")
    tiny_model(tf.LlamaForCausalLM).save_pretrained(folder / "llama")
    language_model = tf.LlamaForCausalLM.from_pretrained(folder / "llama")
    adapted(language_model, task_type="CAUSAL_LM").save_pretrained(folder / "new")
    Image.new("RGB", (40, 48), "orange").save(folder / "flower.png")
    golden = Golden("vit")
    golden.base_model().save_pretrained(folder / "official-base")
    torch.save(golden.checkpoint(lite=False), folder / "official.pth")
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    for name in ("set_verbosity_error", "disable_progress_bar"):  # for all tests after these
        monkeypatch.setattr(logging, name, lambda: None)


def run(command: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(command_line.app, shlex.split(command)[1:])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_runs(command: str, saved: Path) -> None:
    output = run(command).stdout
    if command.endswith("--json"):
        parameters = json.loads(output)["parameters"]
        assert parameters == {"prompt": 32, "transform": 1024, "linear1": 1024, "linear2": 1024} | {
            "modules saved as a whole": 7 * 33
        }
    for option in ("explain", "convert"):
        if option in command:
            assert (saved / shlex.split(command)[-1]).exists()


def test_every_command_is_on_the_page() -> None:
    named = {command.name or command.callback.__name__ for command in command_line.app.registered_commands}
    assert named == {shlex.split(command)[1] for command in COMMANDS}


def test_check_says_how_much_is_selected_and_changed() -> None:
    lines = dict(line.rsplit(" ", 1) for line in run("toast-peft check my-adapter").stdout.splitlines()[1:3])
    assert 0 < float(lines["mean mask:"]) <= float(lines["open tokens:"]) <= 1


def test_what_is_added_in_pass_2_counts_as_a_change(saved: Path) -> None:
    language_model = tf.LlamaForCausalLM.from_pretrained(saved / "llama")
    options = {"pass2_target_modules": "all-linear", "trainable_parts": ["pass2"], "r": 1}
    model = adapted(language_model, task_type="CAUSAL_LM", **options)
    add_noise(*(parameter for name, parameter in model.named_parameters() if "pass2" in name))
    model.save_pretrained(saved / "pass2")
    [line] = [line for line in run("toast-peft check pass2").stdout.splitlines() if line.startswith("the feedback")]
    assert float(line.split()[-3]) > 1


def test_an_adapter_as_before_training_fails_the_check() -> None:
    assert "its feedback is zero" in run("toast-peft info new").stdout
    assert "the feedback changes nothing" in run("toast-peft check new", exit_code=1).stderr


@pytest.mark.parametrize("r", [0, 2])
def test_official_start_is_not_taken_for_one_without_feedback(r: int, saved: Path) -> None:
    base = tf.ViTForImageClassification.from_pretrained(saved / "my-base")
    adapted(base, r=r, init_weights=False).save_pretrained(saved / f"official-start-{r}")
    assert "note" not in run(f"toast-peft info official-start-{r}").stdout


def test_the_head_of_an_official_classifier_is_taken_over_or_named(saved: Path) -> None:
    bare = tf.ViTModel.from_pretrained(saved / "official-base")
    bare.save_pretrained(saved / "bare")
    num_labels = len(Golden("vit").checkpoint(lite=False)["head.last_layer.weight"])
    command = "toast-peft convert official.pth --base-model bare --output"
    assert "head of the checkpoint" in run(f"{command} without-head").stderr
    run(f"{command} with-head --num-labels {num_labels}")
    without, with_head = (
        load_file(saved / name / "adapter_model.safetensors") for name in ("without-head", "with-head")
    )
    assert len(with_head) == len(without) + 2 and any("classifier" in name for name in with_head)


def test_weights_that_are_no_numbers_are_found(saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (saved / "my-adapter").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in weights if "topdown_prompt" in name)
    weights[name][3] = torch.nan
    save_file(weights, broken / "adapter_model.safetensors")
    assert (
        f"1 of {len(weights)} weights are NaN or infinite, the first is {name}"
        in run(f"toast-peft info {broken}", exit_code=1).stderr
    )


def test_an_adapter_of_another_method_is_refused(saved: Path) -> None:
    lora = get_peft_model(tiny_model(tf.LlamaForCausalLM), LoraConfig(target_modules=["v_proj"]))
    lora.save_pretrained(saved / "lora")
    with pytest.raises(ValueError, match="an adapter of the method LORA; expected one of TOAST"):
        CliRunner().invoke(command_line.app, ["info", "lora"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("check my-adapter --text flower", "--text was given, but a ViTForImageClassification takes no `input_ids`"),
        ("check new --image flower.png", "--image was given, but a LlamaForCausalLM takes no `pixel_values`"),
        ("info .", r"The folder '.' has no adapter_config.json; .* In it there are .*'my-adapter'"),
        ("info my-base", "The folder 'my-base' has no adapter_config.json; .* In it there are none"),
    ],
)
def test_what_does_not_fit_is_refused(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(command_line.app, shlex.split(command), catch_exceptions=False)


@pytest.mark.parametrize(("option", "shows_code"), [([], False), (["--debug"], True)])
def test_errors_are_one_sentence_unless_debugged(
    option: list[str], shows_code: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["toast-peft", *option, "info", "nowhere"])
    with pytest.raises(ValueError if shows_code else SystemExit) as caught:
        command_line.main()
    if not shows_code:
        assert caught.value.code == 1
        assert capsys.readouterr().err.startswith("ValueError: Can't find 'adapter_config.json' at 'nowhere'")


def test_wrong_usage_ends_with_2() -> None:
    run("toast-peft info", exit_code=2)
    run("toast-peft explain my-adapter", exit_code=2)
    run("toast-peft explain my-adapter --output x.html", exit_code=2)
    run("toast-peft check my-adapter --image flower.png --text flower", exit_code=2)
    for output in ("x.txt", "nowhere/x.html"):
        result = run(f"toast-peft explain my-adapter --image flower.png --output {output}", exit_code=2)
        assert "expected the name of a .png, .pdf, .svg, .html in a folder that is there" in result.output


@pytest.mark.slow
def test_it_is_a_program() -> None:
    command = [sys.executable, "-m", "toast_peft.commands.app", "env"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"- torch: {torch.__version__.partition('+')[0]}" in printed

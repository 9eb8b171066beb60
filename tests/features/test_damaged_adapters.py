"""Adapters that are damaged at random: each is refused and the model as it was, or it is loaded as its file says.

`pytest tests/features/test_damaged_adapters.py --damaged-adapters 10000 -s` tries more of them and prints what became
of them.
"""

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..helpers import adapted, assert_state_is, output_of, state_of, steered
from ..zoo import add_noise, tiny_model

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
PREFIX = "base_model.model."
BASE_WEIGHTS = ("vit.layers.0.attention.q_proj.weight", "vit.layers.0.mlp.fc1.bias", "vit.layernorm.weight")
ADAPTERS = {
    "full": {},
    "random": {"init_weights": False},
    "lite": {"r": 2},
    "early": {"feedback_from": 1},
    "head": {"modules_to_save": ["classifier"]},
    "lite head": {"r": 3, "init_weights": False, "modules_to_save": ["classifier"]},
}
DTYPES = [
    getattr(torch, name) for name in ("float16", "bfloat16", "float64", "int8", "int64", "bool", "float8_e4m3fn")
]
VALUES: list[Any] = [None, True, "x", "", [], {}, [1], ["x"], {"a": 1}, 0, -1, 3, 2**40, -(2**70), 0.5, 1e308, -1e-3]
VALUES += [float("nan"), float("inf"), [-1], [2**40], "0", "False", "(", "vit", "classifier", ["classifier"]]


def base_model() -> nn.Module:
    return tiny_model(tf.ViTForImageClassification, num_hidden_layers=2)


def trained(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = adapted(base_model(), **options)
    add_noise(*(p for name, p in model.named_parameters() if ".default." in name))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each adapter, and one with an adapter of another model."""
    folder = tmp_path_factory.mktemp("saved")
    for name, options in ADAPTERS.items():
        trained(**options).save_pretrained(folder / name)
    steered(tiny_model(tf.LlamaForCausalLM)).save_pretrained(folder / "llama")
    return {name: folder / name for name in [*ADAPTERS, "llama"]}


# -------------------------------------------------------------------------------------------------------- the damages

Damage = Callable[[Path, random.Random, dict[str, Path]], Any]


def truncated(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: rng.randrange(len(content))])


def oversized(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 1000, 10**6])))


def flipped(folder: Path, rng: random.Random, first: int, last: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


def header_size(folder: Path) -> int:
    return 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")


def bits_of_weights(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    flipped(folder, rng, header_size(folder), (folder / WEIGHTS).stat().st_size)


def bits_of_header(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    flipped(folder, rng, 0, header_size(folder))


def lying_header(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    content, size = (folder / WEIGHTS).read_bytes(), header_size(folder)
    header = json.loads(content[8:size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    start, end = entry["data_offsets"]
    lies = [
        {"shape": [*entry["shape"], 2]},
        {"shape": entry["shape"][::-1] + [1]},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"dtype": rng.choice(["F64", "F16", "I8", "X9"])},
        {"dtype": "I32"},
        {"data_offsets": [start, end + 4]},
        {"data_offsets": [end, start]},
        {"data_offsets": [0, 2**60]},
    ]
    entry.update(rng.choice(lies))
    text = json.dumps(header).encode()
    length = rng.choice([len(text), len(text), len(text), len(text) + 1, 2**40, 0])
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + content[size:])


def change_weights(change: Callable[[dict[str, torch.Tensor], str, random.Random], Any]) -> Damage:
    """A damage that saves weights as they should be saved, but others; `change` gets the name of one of them."""

    def damage(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights, rng.choice(sorted(weights)), rng)
        save_file(weights, folder / WEIGHTS)

    return damage


def not_finite(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    values = weights[name].view(-1)
    values[rng.randrange(len(values))] = rng.choice([torch.nan, torch.inf, -torch.inf])


def dtype(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    chosen = rng.choice(DTYPES)
    for other in rng.choice([[name], list(weights)]):
        weights[other] = weights[other].to(chosen)


def missing(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    del weights[name]


def shape(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    tensor = weights[name]
    weights[name] = rng.choice([tensor[:-1], tensor[None], tensor.repeat(2, *[1] * (tensor.dim() - 1)), tensor[:0]])
    weights[name] = weights[name].contiguous()


def extra(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    names = [f"{PREFIX}{of_base}" for of_base in BASE_WEIGHTS]
    names += [name.replace("topdown_", "topdown_x"), name.removeprefix(PREFIX), PREFIX + name, "x", f"{name}.default"]
    names += [".default.".join(name.rsplit(".", 1))]
    extra_name = rng.choice([new for new in names if new not in weights])
    of_base = base_model().state_dict().get(extra_name.removeprefix(PREFIX))
    weights[extra_name] = weights[name].clone() if of_base is None else of_base + 1


def rename(weights: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
    names = [name] if rng.random() < 0.5 else list(weights)
    change = rng.choice(
        [lambda n: n.removeprefix(PREFIX), lambda n: PREFIX + n, lambda n: n.replace("e", "a"), str.upper]
    )
    for old in names:
        weights[change(old)] = weights.pop(old)


def swapped(file: str) -> Damage:
    def damage(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
        other = rng.choice([name for name in saved if name != folder.name])
        (folder / file).write_bytes((saved[other] / file).read_bytes())

    return damage


def no_weights(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    (folder / WEIGHTS).unlink()
    if rng.random() < 0.5:
        (folder / WEIGHTS).touch()


def pickle(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    wrong = [[], {"x": 1}, {"x": Path()}, list(weights.values()), {name: t.to_sparse() for name, t in weights.items()}]
    torch.save(rng.choice([weights, weights, *wrong]), folder / PICKLE)
    if rng.random() < 0.3:
        (folder / PICKLE).write_bytes(rng.randbytes(rng.randrange(200)))


def change_config(change: Callable[[dict[str, Any], random.Random], Any]) -> Damage:
    def damage(folder: Path, rng: random.Random, saved: dict[str, Path]) -> str:
        config = json.loads((folder / CONFIG).read_text())
        name, value = change(config, rng)
        config[name] = value
        (folder / CONFIG).write_text(json.dumps(config))
        return f"{name}={value!r}"

    return damage


def value_in_config(config: dict[str, Any], rng: random.Random) -> tuple[str, Any]:
    # Another method is no damage; and `pretrained_feedback` may be a path of this machine.
    names = sorted(config.keys() - {"peft_type", "pretrained_feedback"})
    return rng.choice(names), rng.choice(VALUES)


def unknown_in_config(config: dict[str, Any], rng: random.Random) -> tuple[str, Any]:
    return rng.choice(["rank", "future_option", "R", "", "self", "is_of_saved_adapter"]), rng.choice(VALUES)


def method_in_config(config: dict[str, Any], rng: random.Random) -> tuple[str, Any]:
    return "peft_type", rng.choice(["TOPDOWM", "", 3])


def text_of_config(folder: Path, rng: random.Random, saved: dict[str, Path]) -> None:
    text = (folder / CONFIG).read_text()
    texts = [text[: rng.randrange(len(text) - 1)], text.replace(":", "="), "[]", "null", "", text + "}"]
    (folder / CONFIG).write_text(rng.choice(texts))


REFUSED, LOADED = "refused", "loaded"
# What must happen, each at least once, to adapters with this damage.
DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "truncated": (truncated, {REFUSED}),
    "oversized": (oversized, {REFUSED}),
    "bits of the header": (bits_of_header, {REFUSED}),
    "bits of the weights": (bits_of_weights, {LOADED}),
    "lying header": (lying_header, {REFUSED}),
    "not finite": (change_weights(not_finite), {REFUSED}),
    "dtype": (change_weights(dtype), {LOADED, REFUSED}),
    "missing": (change_weights(missing), {REFUSED}),
    "shape": (change_weights(shape), {REFUSED}),
    "extra": (change_weights(extra), {REFUSED}),
    "renamed": (change_weights(rename), {REFUSED}),
    "swapped weights": (swapped(WEIGHTS), {REFUSED}),
    "no weights": (no_weights, {REFUSED}),
    "pickle": (pickle, {LOADED, REFUSED}),
    "swapped config": (swapped(CONFIG), {REFUSED}),
    "value in the config": (change_config(value_in_config), {LOADED, REFUSED}),
    "unknown in the config": (change_config(unknown_in_config), {LOADED}),
    "method in the config": (change_config(method_in_config), {REFUSED}),
    "text of the config": (text_of_config, {REFUSED}),
}
# A changed bit can be one of the metadata or of a number; the swapped file may be of an adapter of the same form.
MAY_BE_EITHER = {
    "bits of the header",
    "bits of the weights",
    "swapped weights",
    "swapped config",
    "unknown in the config",
}


# ----------------------------------------------------------------------------------------------------- what is loaded

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """What the file says, read without the libraries that load adapters."""
    if (folder / PICKLE).exists():
        return torch.load(folder / PICKLE)
    content, size = (folder / WEIGHTS).read_bytes(), header_size(folder)
    header = json.loads(content[8:size])
    header.pop("__metadata__", None)
    return {
        name: torch.frombuffer(
            bytearray(content[size + start : size + end]), dtype=SAFETENSORS_DTYPES[entry["dtype"]]
        ).view(entry["shape"])
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def assert_loaded(model: PeftModel, adapter_name: str, folder: Path, of_base: dict[str, torch.Tensor]) -> None:
    """The parameters of the adapter are those of the file, all others those of the base model."""
    expected = {}
    for name, tensor in tensors_in(folder).items():
        module, _, last = name.rpartition(".")
        name = (
            f"{module}.{adapter_name}.{last}"
            if "topdown_" in name
            else f"{module}.modules_to_save.{adapter_name}.{last}"
        )
        expected[name] = tensor
    weights = model.state_dict()
    found = {name for name in weights if f".{adapter_name}." in name}
    assert found == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)) and weights[name].isfinite().all(), name
    for name, tensor in of_base.items():
        name = PREFIX + name
        name = name if name in weights else ".original_module.".join(name.rsplit(".", 1))
        assert torch.equal(weights[name], tensor), name


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, PeftModel]:
    return base_model(), trained(r=2, feedback_from=1)


def load(models: tuple[nn.Module, PeftModel], folder: Path, how: str) -> tuple[str, str]:
    """Load an adapter in one of three ways, check everything and tell what has happened and the reason."""
    model, of_base = copy.deepcopy(models[how == "second"]), models[0].state_dict()
    before, output = state_of(model), output_of(model)
    try:
        if how == "second":
            model.load_adapter(folder, "other")
            loaded, name = model, "other"
        else:
            loaded, name = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=how == "low memory"), "default"
    except Exception as error:
        assert_state_is(model, before)
        return REFUSED, f"{type(error).__name__}: {error}"
    assert_loaded(loaded, name, folder, of_base)
    if how == "second":
        assert torch.equal(output_of(model), output)
    return LOADED, ""


@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters(
    request: pytest.FixtureRequest,
    models: tuple[nn.Module, PeftModel],
    saved: dict[str, Path],
    tmp_path: Path,
) -> None:
    outcomes: dict[str, Counter] = {name: Counter() for name in DAMAGES}
    raw: Counter = Counter()
    for number in range(request.config.getoption("--damaged-adapters")):
        rng = random.Random(number)
        kind = list(DAMAGES)[number % len(DAMAGES)]
        adapter, how = rng.choice(list(ADAPTERS)), rng.choice(["first", "low memory", "second"])
        shutil.rmtree(tmp_path)
        folder = tmp_path / adapter
        shutil.copytree(saved[adapter], folder)
        torch.manual_seed(number)
        damage, wanted = DAMAGES[kind]
        what = damage(folder, rng, saved)
        case = f"case {number}: {kind}, {adapter}, {how}, {what}"
        try:
            outcome, reason = load(models, folder, how)
        except AssertionError as error:
            raise AssertionError(case) from error
        outcomes[kind][outcome] += 1
        assert outcome in wanted or kind in MAY_BE_EITHER, f"{case}: {outcome} {reason}"
        if outcome == REFUSED and not kind.endswith("config"):
            assert reason.startswith("ValueError: ") and "TOAST adapter" in reason, f"{case}: {reason}"
        elif outcome == REFUSED and not reason.startswith("ValueError"):
            raw[f"{what}: {reason[:150]}"] += 1
    for kind, counts in outcomes.items():
        print(f"{kind:24} {counts[REFUSED]:6} refused {counts[LOADED]:6} loaded")
        assert DAMAGES[kind][1] <= counts.keys(), kind
    print("of the configs, refused by PEFT or Python:", *sorted(raw), sep="\n  ")

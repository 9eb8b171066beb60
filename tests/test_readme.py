"""What the README says that can be checked."""

import re
from pathlib import Path

from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from toast_peft import TopDownConfig
from toast_peft.architectures import ARCHITECTURES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_printed_parameters() -> None:
    """The first example, with a model of the same shape."""
    base = ViTForImageClassification(ViTConfig(num_labels=10))
    model = get_peft_model(base, TopDownConfig(r=8, modules_to_save=["classifier"]))
    trainable, total = model.get_nb_trainable_parameters()
    assert f"# trainable params: {trainable:,} || all params: {total:,} || " in README


def test_every_option_is_explained() -> None:
    options = set(re.findall(r"`(\w+)`", README.split("## Options")[1].split("## ")[0]))
    assert set(TopDownConfig.__dataclass_fields__) - set(TopDownConfig.__mro__[1].__dataclass_fields__) <= options | {
        "backbone_type",
        "num_blocks",
        "hidden_size",
    }


def test_supported_models_are_named() -> None:
    section = README.split("## Supported models")[1].split("## ")[0].lower().replace(" ", "").replace("-", "")
    for model_type in ARCHITECTURES:
        family = model_type.removesuffix("_vision_model").removesuffix("_text").replace("_", "").replace("-", "")
        assert family in section

"""An adapter on its base model, and what they are run on."""

import re
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.image_utils import load_image

from ..callback import closed_by_prompt, feedback_statistics
from ..config import TopDownConfig
from ..core.layers import feedback_paths
from ..core.strength import rescaled
from ..prompt_start import random_inputs
from .saved import not_finite, read_config, read_weights

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass
class Loaded:
    """A model with its adapter.

    Args:
        model: in evaluation mode.
        base_model: where the base model is from.
        weights: of the adapter, as they were saved.
        processor: of images or texts, once it has been needed.
    """

    model: PeftModel
    base_model: str
    weights: dict[str, torch.Tensor]
    processor: Any = None

    def inputs(self, image: Path | None, text: str | None) -> dict[str, Any]:
        """What to run the model on: an image or a text, or else random numbers.

        Raises:
            ValueError: if the model takes no images, or no texts.
            RuntimeError: if it is not known what the model takes.
        """
        base = cast(PreTrainedModel, self.model.get_base_model())
        taken = signature(base.forward).parameters
        for given, name, option in ((image, "pixel_values", "--image"), (text, "input_ids", "--text")):
            if given is not None and name not in taken:
                raise ValueError(f"{option} was given, but a {type(base).__name__} takes no `{name}`; leave it out.")
        if image is not None:
            self.processor = AutoImageProcessor.from_pretrained(self.base_model, backend="pil")
            return dict(self.processor(load_image(str(image)), return_tensors="pt"))
        if text is not None:
            self.processor = AutoTokenizer.from_pretrained(self.base_model)
            config = base.config
            start = torch.tensor([[config.decoder_start_token_id]]) if config.is_encoder_decoder else None
            decoder = {} if start is None else {"decoder_input_ids": start}
            return dict(self.processor(text, return_tensors="pt")) | decoder
        return random_inputs(base)


def load(adapter: str, base_model: str | None) -> Loaded:
    """Load an adapter and its base model.

    Args:
        adapter: its folder or id.
        base_model: that of the base model, `None` for the one that the adapter names.

    Raises:
        ValueError: if no base model is known, or one of them cannot be loaded.
    """
    config = read_config(adapter)
    weights = read_weights(config)
    location = base_model or config.base_model_name_or_path
    if not location:
        raise ValueError(f"The adapter {adapter!r} does not name its base model; give it with --base-model.")
    base = load_base(location, config, weights)
    return Loaded(PeftModel.from_pretrained(base, adapter).eval(), location, weights)


def load_base(
    location: str, config: TopDownConfig | None = None, weights: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Load a base model, with a head of the size that the adapter has trained."""
    model_class = getattr(transformers, _class_name(location, config), None)
    if model_class is None:
        raise ValueError(
            f"The adapter was made for a {_class_name(location, config)}, which is no class of transformers; load it "
            "in Python, with `PeftModel.from_pretrained`."
        )
    heads = [w for name, w in (weights or {}).items() if re.search(r"\.(classifier|score)(\.\w+)?\.weight$", name)]
    options = {"num_labels": len(heads[-1]), "ignore_mismatched_sizes": True} if heads else {}
    return model_class.from_pretrained(location, **options)


def load_classifier(location: str, num_labels: int) -> PreTrainedModel:
    """Load a base model with a head for images."""
    options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    return AutoModelForImageClassification.from_pretrained(location, **options)


def _class_name(location: str, config: TopDownConfig | None) -> str:
    """The class of the base model: by what the adapter says, else by what the base model was saved from."""
    if config is not None and config.task_type in _AUTO_CLASSES:
        return _AUTO_CLASSES[config.task_type]
    if config is not None and config.auto_mapping:
        return config.auto_mapping["base_model_class"]
    return (AutoConfig.from_pretrained(location).architectures or ["AutoModel"])[0]


@torch.no_grad()
def report_on(loaded: Loaded, inputs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Run the adapter, and say what it does.

    Returns:
        Lines of facts, and problems: weights or outputs that are no numbers, a prompt that selects nothing, feedback
        that changes nothing.
    """
    model, problems = loaded.model, not_finite(loaded.weights)
    output = _output_of(model, inputs)
    statistics = feedback_statistics(model)
    plain = _output_of_pass_1(model, inputs)
    change = ((output - plain).norm() / plain.norm()).item()
    lines = [f"loaded on {loaded.base_model}: {sum(w.numel() for w in loaded.weights.values()):,} values"]
    lines += [f"{name.replace('_', ' ')}: {value:.3f}" for name, value in statistics.items()]
    lines.append(f"the feedback changes the output by {100 * change:.2f} per cent")
    if not output.isfinite().all():
        problems.append("the output is not finite.")
    closed = closed_by_prompt(statistics)
    if closed:  # LoRA of pass 2 does not ask it
        selects_nothing = f"the prompt selects nothing in these inputs ({closed[0]} is 0), so there is no feedback."
        (problems if change == 0 else lines).append(selects_nothing)
    elif any(name.endswith("mean_gate") and value == 0 for name, value in statistics.items()):
        lines.append("the gate is closed for these inputs, which get the output of the base model")
    elif change == 0:
        problems.append("the feedback changes nothing, as before training.")
    return lines, problems


def _output_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, or else hidden states, as one row of numbers."""
    output = model(**inputs)
    return (output["logits"] if "logits" in output else output[0]).float().flatten()


def _output_of_pass_1(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The same with trained heads, but without feedback and what else is added in pass 2."""
    with rescaled((path.selection for _, path in feedback_paths(model)), 0.0):
        return _output_of(model, inputs)

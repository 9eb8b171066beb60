"""Where a config was read from, so that the weights next to it can be looked at before a model is changed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

# What PEFT sets in a config between reading and using it.
_SET_BY_PEFT = ("base_model_name_or_path", "inference_mode", "revision")


@dataclass
class SavedAdapter:
    """A folder or repository with an adapter.

    Args:
        model_id: its path or Hub id.
        arguments: which revision, subfolder and so on, as `hf_hub_download` takes them.
        config: the config as it was read.
    """

    model_id: str
    arguments: dict[str, Any] = field(repr=False)  # a token may be among them
    config: dict[str, Any]

    def is_of(self, config: PeftConfig) -> bool:
        """Whether the config is still the one that was read; one with other options is for a new adapter."""
        unset = dict.fromkeys(_SET_BY_PEFT)
        return config.to_dict() | unset == self.config | unset

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The saved weights, by their names in the file.

        Raises:
            ValueError: if there are none or they cannot be read.
        """
        folder = Path(self.model_id, self.arguments.get("subfolder") or "")
        if folder.is_dir() and not any((folder / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise ValueError(
                f"There are no weights of the TOAST adapter {str(folder)!r}, only its config; expected a file "
                f"{SAFETENSORS_WEIGHTS_NAME} beside it. Save or download the adapter again."
            )
        try:
            weights = load_peft_weights(self.model_id, device="cpu", **self.arguments)
        except Exception as error:
            raise ValueError(
                f"The weights of the TOAST adapter {str(self.model_id)!r} cannot be read: {type(error).__name__}: "
                f"{error}. Expected an undamaged adapter_model.safetensors next to adapter_config.json; save or "
                "download the adapter again."
            ) from error
        if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(
                f"The weights of the TOAST adapter {str(self.model_id)!r} are a {type(weights).__name__}; expected a "
                "dict of tensors. Save the adapter again with `save_pretrained`."
            )
        return weights

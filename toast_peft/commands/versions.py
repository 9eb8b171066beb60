"""The versions of what a model runs with."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import toast_peft

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "torchao",
)


def versions() -> dict[str, str]:
    """Versions by name, and the devices that torch sees."""
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "toast_peft": toast_peft.__version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "accelerators": ", ".join(accelerators) or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

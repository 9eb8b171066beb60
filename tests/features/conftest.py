"""Where the tests run that ask for a device: on a GPU as well, if there is one."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# MPS has no float64, in which most is compared.
ACCELERATORS = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
DEVICES = ["cpu", *(kind for kind in ACCELERATORS if kind != "mps")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The type of the device.

    transformers computes the norms of Llama in float32, whatever the dtype, and a GPU rounds these sums otherwise when
    a batch has other rows. They are in float64 for such models here.
    """
    in_float32 = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return in_float32(self, x)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return request.param

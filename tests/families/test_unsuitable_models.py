"""Models that named value projections alone do not make right: refused, and none steered wrongly in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from ..helpers import adapted, output_of, turn_prompts
from ..zoo import inputs_of, tiny_model

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = _SIZES | {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
_STAGES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "depths": [1, 2],
}
_MAMBA = {"mamba_d_state": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "attention_head_dim": 16}
_RWKV = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 16}
_REFORMER = {"attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]}
_AUDIO = {"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embedding_groups": 2}
_SERIES = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "d_model": 32, "num_attention_heads": 4}
_LED = {"vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_LAYERS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
_STATE = "state outside of a key-value cache"

# Config -> its value projections, and what is said.
UNSUITABLE: dict[str, tuple[Callable[[], tf.PretrainedConfig], str, str]] = {
    "recurrent_gemma": (
        lambda: tf.RecurrentGemmaConfig(**_TEXT | {"num_key_value_heads": 1, "lru_width": 32, "num_hidden_layers": 3}),
        "v_proj",
        _STATE,
    ),
    "rwkv": (lambda: tf.RwkvConfig(**_RWKV), "attention.value", _STATE),
    "reformer": (lambda: tf.ReformerConfig(**_REFORMER, vocab_size=40, hidden_size=32), "value", _STATE),
    "minimax": (lambda: tf.MiniMaxConfig(**_TEXT | _EXPERTS), "v_proj", "cache of its own kind"),
    "gemma3n": (
        lambda: tf.Gemma3nTextConfig(
            **_TEXT, vocab_size_per_layer_input=40, activation_sparsity_pattern=[0.0] * 2, num_kv_shared_layers=0
        ),
        "v_proj",
        "several copies of the hidden states",
    ),
    "longformer": (lambda: tf.LongformerConfig(**_TEXT, attention_window=[4, 4]), "self.value", "swaps the batch"),
    "patchtst": (lambda: tf.PatchTSTConfig(**_SERIES), "v_proj", "channels of a series"),
    "vit_mae": (lambda: tf.ViTMAEConfig(**_SIZES, image_size=8, patch_size=4), "(value|v_proj)", "a random order"),
    "vilt": (lambda: tf.ViltConfig(**_TEXT, image_size=8, patch_size=4), "(value|v_proj)", "a random order"),
    "xlstm": (lambda: tf.xLSTMConfig(hidden_size=32, num_hidden_layers=2, num_heads=2), "mlstm_layer.v", _STATE),
    "led": (lambda: tf.LEDConfig(**_LED), "longformer_self_attn.value", "swaps the batch"),
    "wavlm": (lambda: tf.WavLMConfig(**_SIZES, **_AUDIO), "v_proj", "weight of the value projection"),
    "informer": (
        lambda: tf.InformerConfig(prediction_length=4, lags_sequence=[1, 2], **_LAYERS),
        "self_attn.v_proj",
        "halves the number of tokens",
    ),
    "xcodec": (lambda: tf.XcodecConfig(), "v_proj", "out of the gradients"),
    "zamba2": (
        lambda: tf.Zamba2Config(**_TEXT | _MAMBA, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1),
        "v_proj",
        "block 1 takes 64 channels and not the 32 of the hidden states",
    ),
    "pvt": (lambda: tf.PvtConfig(**_STAGES, sequence_reduction_ratios=[2, 1]), "value", "list of lists"),
    "glpn": (lambda: tf.GLPNConfig(**_STAGES, sr_ratios=[2, 1]), "value", "list of lists"),
}


@pytest.mark.parametrize("model_type", UNSUITABLE)
def test_refused_before_anything_is_changed(model_type: str) -> None:
    make_config, value_projection, message = UNSUITABLE[model_type]
    with torch.device("meta"):
        model = tf.AutoModel.from_config(make_config())
    names, modules = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"TOAST does not support.*{message}") as error:
        adapted(model, target_modules=rf".*\.{value_projection}")
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    if "TOAST does not support the model type" in str(error.value):
        with pytest.raises(ValueError, match=message):
            adapted(model)


@pytest.mark.parametrize("name", ["query", "key", "output.dense"])
def test_other_layers_of_a_known_type(name: str) -> None:
    model = tiny_model(tf.BertForSequenceClassification)
    with pytest.raises(ValueError, match="does not compute values; expected 'attention.self.value' of each block"):
        adapted(model, target_modules=rf".*attention\..*{name}")


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "out_proj", "fc_in"])
def test_other_layers_of_a_type_that_is_found_by_its_structure(name: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 40}
    model = tf.GPTJForCausalLM(tf.GPTJConfig(**sizes))
    with pytest.raises(ValueError, match=rf"\.{name}, which does not compute values; expected 'attn.v_proj' of each"):
        adapted(model, target_modules=[name])


class Block(nn.Module):
    """Attention whose value projection is called in one way or another."""

    def __init__(self, values: Callable[[nn.Linear, torch.Tensor], torch.Tensor], width: int = 32) -> None:
        super().__init__()
        self.values = nn.Linear(width, 32)
        self.call = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.call(self.values, x)


class Model(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*args) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda layer, x: F.linear(x, layer.weight),), "Block 0, a Block, does not call the value projection"),
        ((lambda layer, x: layer(x.mean(1, keepdim=True)),), r"the shape \[3, 5, 32\] and .* \[3, 1, 32\]"),
        ((lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),), r"the shape \[3, 5, 32\] and .* \[5, 3, 32\]"),
        (
            (lambda layer, x: layer(x[..., :16]), 16),
            "states have 32 channels and the value projections take 16",
        ),
    ],
    ids=["weight", "pooled", "transposed", "narrow"],
)
def test_found_out_in_the_first_forward(arguments: tuple, message: str, compiled: bool) -> None:
    model = adapted(Model(*arguments), target_modules=["values"])
    model = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(torch.randn(3, 5, 32))


def test_compiled_in_one_graph_with_the_checks() -> None:
    model = adapted(Model(lambda layer, x: layer(x)), target_modules=["values"])
    x = torch.randn(3, 5, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# --------------------------------------------------------------------------------- recorded by a model around it


_RECORDED = {
    "wav2vec2": (lambda: tiny_model(tf.Wav2Vec2ForCTC), None),
    "xlm-roberta": (lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**_SIZES, vocab_size=40)), ["value"]),
    "videomae": (
        lambda: tf.VideoMAEModel(tf.VideoMAEConfig(**_SIZES, image_size=8, patch_size=4, num_frames=4)),
        r".*value",
    ),
}


@pytest.mark.parametrize("model_type", _RECORDED)
def test_hidden_states_of_pass_2_only_are_recorded(model_type: str) -> None:
    """Also where the module that is run twice is an encoder inside of the model that records."""
    make_model, target_modules = _RECORDED[model_type]
    base = make_model().eval()
    inputs = {"pixel_values": torch.randn(2, 4, 3, 8, 8)} if model_type == "videomae" else inputs_of(base)
    inputs |= {"output_hidden_states": True}
    expected = base(**inputs)
    model = adapted(base, target_modules=target_modules)
    found = model(**inputs)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert torch.equal(found[0], expected[0])
    turn_prompts(model, inputs=inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) if "topdown_linear2" in name else 0)
    assert not torch.allclose(output_of(model, inputs), expected[0], atol=1e-3)
    assert len(model(**inputs).hidden_states) == len(expected.hidden_states)

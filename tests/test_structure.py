"""The stack of blocks of a transformer without a row for its model type, found by its structure."""

import logging
import re
from pathlib import Path

import pytest
import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from toast_peft import TopDownConfig
from toast_peft.families.model_types import Architecture
from toast_peft.families.structure import architectures_by_structure
from toast_peft.families.transformers import find_transformer_stacks

from .helpers import adapted, paths_of
from .sweep_model_types import examine
from .zoo import MODELS, tiny_model

MODELS_PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
# Model type -> what the page says of it: found by, result.
ON_PAGE = dict(re.findall(r"^\| `([\w.-]+)` \| (\w* \| \w+)", MODELS_PAGE, re.MULTILINE))
# The quarter of them that is tried here; `python -m tests.sweep_model_types` tries all.
QUARTER = [
    name
    for name in sorted(name for name, result in ON_PAGE.items() if result.endswith(("right", "refused")))[::4]
    if name in CONFIG_MAPPING_NAMES
]


@pytest.mark.parametrize("model_type", QUARTER)
def test_right_or_refused_as_the_page_of_models_says(model_type: str) -> None:
    row = examine(model_type)
    assert row.result in {"right", "refused"}, row
    if f"transformers {tf.__version__}" in MODELS_PAGE:
        assert f"{row.found} | {row.result}" == ON_PAGE[model_type]


def test_most_model_types_are_right() -> None:
    assert sum(result.endswith("right") for result in ON_PAGE.values()) >= 200
    assert not any(result.endswith("wrong") for result in ON_PAGE.values())


_LLAMA = Architecture("layers", "self_attn.v_proj", "norm")
_QWEN_VISION = Architecture("blocks", "attn.qkv", None, fused="one after the other")
EXPECTED = {
    "deberta-v2": Architecture("encoder.layer", "attention.self.value_proj", None),
    "distilbert": Architecture("transformer.layer", "attention.v_lin", None),
    "falcon": Architecture("h", "self_attention.query_key_value", "ln_f", fused="by key-value head"),
    "gpt2": Architecture("h", "attn.c_attn", "ln_f", fused="one after the other"),
    "gpt_neox": Architecture("layers", "attention.query_key_value", "final_layer_norm", fused="by key-value head"),
    "hubert": Architecture("layers", "attention.v_proj", None),
    "llama": _LLAMA,
    "mixtral": _LLAMA,
    "modernbert": Architecture("layers", "attn.Wqkv", "final_norm", fused="one after the other"),
    "phi3": Architecture("layers", "self_attn.qkv_proj", "norm", fused="one after the other"),
    "qwen2_5_vl_text": _LLAMA,
    "qwen2_5_vl_vision": _QWEN_VISION,
    "qwen3_vl_text": _LLAMA,
    "qwen3_vl_vision": _QWEN_VISION,
    "wav2vec2": Architecture("layers", "attention.v_proj", None),
    "whisper": Architecture("layers", "self_attn.v_proj", "layer_norm"),
}


def test_finds_blocks_value_projection_norm_and_layout() -> None:
    found = {}
    for model_class in MODELS:
        model = tiny_model(model_class)
        for name, architecture in architectures_by_structure(model, {})[0].items():
            found[model.get_submodule(name).config.model_type] = architecture
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **_TOKENS}
_VISION = _SIZES | {"image_size": 8, "patch_size": 4}


def test_says_once_what_it_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="toast_peft")
    adapted(tf.GPTJForCausalLM(tf.GPTJConfig(**_GPTJ)))
    [message] = [record.message for record in caplog.records if "found the blocks" in record.message]
    assert "GPTJForCausalLM" in message and "'transformer.h'" in message and "'attn.v_proj'" in message


def test_features_do_not_pass_a_norm_unless_asked_to() -> None:
    [stack] = find_transformer_stacks(tf.GPTJForCausalLM(tf.GPTJConfig(**_GPTJ)), TopDownConfig())
    assert stack.final_norm == "ln_f" and not stack.normalize_features


@pytest.mark.parametrize("target_modules", [None, ["v_proj"]], ids=["found", "named"])
def test_is_what_target_modules_give(target_modules: list[str] | None) -> None:
    [stack] = find_transformer_stacks(
        tf.GPTJForCausalLM(tf.GPTJConfig(**_GPTJ)), TopDownConfig(target_modules=target_modules)
    )
    assert stack.blocks_name == "transformer.h" and stack.model_type == "gptj" and len(stack.names) == 2


def test_encoder_and_decoder_of_bart_are_both_found() -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = adapted(tf.BartForConditionalGeneration(tf.BartConfig(**sizes, **heads, **_TOKENS)))
    assert [len(path.layers) for path in paths_of(model)] == [2, 3]


def test_language_model_of_a_model_with_a_vision_tower() -> None:
    text = tf.GPTNeoXConfig(**_SIZES, **_TOKENS)
    config = tf.LlavaConfig(text_config=text, vision_config=tf.CLIPVisionConfig(**_VISION), image_token_index=39)
    [stack] = find_transformer_stacks(tf.LlavaForConditionalGeneration(config), TopDownConfig())
    assert stack.model_type == "gpt_neox"


def test_vision_tower_is_no_replacement_for_a_language_model() -> None:
    text = tf.DeepseekV3Config(**_SIZES, **_LATENT, **_TOKENS, first_k_dense_replace=2)
    config = tf.LlavaConfig(text_config=text, vision_config=tf.CLIPVisionConfig(**_VISION), image_token_index=39)
    with pytest.raises(ValueError, match="come from a latent"):
        find_transformer_stacks(tf.LlavaForConditionalGeneration(config), TopDownConfig())


def test_two_towers_are_named() -> None:
    config = tf.CLIPConfig(vision_config=_VISION, text_config=_SIZES | _TOKENS)
    with pytest.raises(ValueError, match=r"several stacks of blocks: .*'text_model.*'vision_model.*target_modules=r'"):
        adapted(tf.CLIPModel(config))


class Attention(nn.Module):
    """Only to be found; it is never run."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class Block(nn.Module):
    def __init__(self, **attentions: nn.Module) -> None:
        super().__init__()
        for name, attention in attentions.items():
            setattr(self, name, attention)

    def forward(self) -> None: ...


class Model(Block):
    """A module that runs its lists of blocks."""


def _attention(name: str = "v_proj", size: int = 32) -> nn.Module:
    return Attention(q_proj=nn.Linear(32, 32), **{name: nn.Linear(32, size)})


def _shared() -> nn.Module:
    block = Block(attn=_attention())
    return Model(layers=nn.ModuleList([block, block]))


UNCLEAR = {
    "nothing": (lambda: Model(layers=nn.ModuleList([nn.Linear(32, 32)])), "no list of blocks has a layer"),
    "two lists in one module": (
        lambda: Model(
            first=nn.ModuleList([Block(attn=_attention())]), second=nn.ModuleList([Block(attn=_attention())])
        ),
        "first and second are two lists of blocks in one module",
    ),
    "two attentions in a block": (
        lambda: Model(layers=nn.ModuleList([Block(space=_attention(), time=_attention())])),
        r"each of layers has several value projections, space\.v_proj, time\.v_proj",
    ),
    "different blocks": (
        lambda: Model(layers=nn.ModuleList([Block(attn=_attention()), Block(attn=_attention("value"))])),
        r"the blocks of layers have different value projections, attn\.v_proj, attn\.value",
    ),
    "attention layers": (
        lambda: Model(attentions=nn.ModuleList([_attention(), _attention()])),
        "attentions is a list of attention layers",
    ),
    "stages": (
        lambda: Model(stages=nn.ModuleList([nn.ModuleList([Block(attn=_attention())])])),
        "stages is a list of lists",
    ),
    "shared": (_shared, "some blocks of layers are one and the same module"),
    "torch attention": (
        lambda: Model(layers=nn.ModuleList([Block(attn=nn.MultiheadAttention(32, 4))])),
        r"the values of layers are computed by torch's nn\.MultiheadAttention \(attn\)",
    ),
    "cross-attention only": (
        lambda: Model(layers=nn.ModuleList([Block(cross_attn=_attention())])),
        "no list of blocks has a layer",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_is_one_error_that_names_target_modules(case: str) -> None:
    make_model, message = UNCLEAR[case]
    with pytest.raises(ValueError, match=f"TOAST finds no value projections in Model .*{message}.*target_modules="):
        find_transformer_stacks(make_model(), TopDownConfig())


def test_cross_attention_beside_self_attention_is_left_alone() -> None:
    model = Model(layers=nn.ModuleList(Block(self_attn=_attention(), encoder_attn=_attention()) for _ in range(2)))
    [stack] = find_transformer_stacks(model, TopDownConfig())
    assert list(stack.names) == ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]


def test_blocks_without_attention_get_no_feedback() -> None:
    blocks = [Block(attn=_attention()), Block(conv=nn.Linear(32, 32)), Block(attn=_attention())]
    [stack] = find_transformer_stacks(Model(layers=nn.ModuleList(blocks)), TopDownConfig())
    assert stack.names == {"layers.0.attn.v_proj": 0, "layers.2.attn.v_proj": 2}


def test_fused_projection_of_another_size_than_its_heads_have() -> None:
    model = Model(blocks=nn.ModuleList(Block(attn=_attention("qkv", 3 * 32 + 5)) for _ in range(2)))
    model.config = tf.ViTConfig(hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv gives 101 channels, .* 4 queries .* of 8 channels"):
        find_transformer_stacks(model, TopDownConfig())


@pytest.mark.parametrize(("multi_query", "columns"), [(True, (1, 8)), (False, (4, 8))])
def test_layout_that_the_config_decides(multi_query: bool, columns: tuple[int, int]) -> None:
    config = tf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, multi_query=multi_query, **_TOKENS)
    [stack] = find_transformer_stacks(tf.GPTBigCodeForCausalLM(config), TopDownConfig())
    assert stack.value_columns == columns


def test_keys_and_values_in_one_projection() -> None:
    model = Model(blocks=nn.ModuleList(Block(attn=_attention("kv_proj", 48)) for _ in range(2)))
    [stack] = find_transformer_stacks(model, TopDownConfig())
    assert stack.value_columns == (1, 24)

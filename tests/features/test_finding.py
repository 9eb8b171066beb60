"""Which blocks of a model are found and chosen, by model type or by name, also in models that are not in a table."""

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from toast_peft import TopDownConfig

from ..golden.reference import reference_forward
from ..helpers import adapted, output_of, steer, steered
from ..zoo import NUM_BLOCKS, VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model


def steered_blocks(model: PeftModel) -> list[int]:
    """Blocks that have feedback parameters."""
    names = [name for name, _ in model.named_parameters() if "topdown_linear2" in name]
    return sorted({int(name.split(".topdown_")[0].rpartition(".")[2]) for name in names})


@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        (tf.LlamaForCausalLM, "CAUSAL_LM", None),
        (tf.LlamaForSequenceClassification, "SEQ_CLS", "score"),
        (tf.LlamaForTokenClassification, "TOKEN_CLS", "score"),
        (tf.Gemma3TextForSequenceClassification, "SEQ_CLS", "score"),
        (tf.LlamaModel, "FEATURE_EXTRACTION", None),
    ],
)
def test_task_types(model_class: type, task_type: str, head: str | None) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    of_head = [name for name, _ in getattr(base, head).named_parameters()] if head else []
    model = adapted(base, task_type=task_type)
    assert torch.equal(output_of(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "topdown_" not in name}
    assert trained == {f"base_model.model.{head}.modules_to_save.default.{name}" for name in of_head}


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fractions_of_depth(model_class: type) -> None:
    model = adapted(tiny_model(model_class), feedback_from=0.75, feedback_to=0.25)
    assert steered_blocks(model) == [1, 2]


@pytest.mark.parametrize("model_class", [tf.ViTModel, tf.ViTForImageClassification, tf.CLIPVisionModel, tf.LlamaModel])
@pytest.mark.parametrize("target_modules", [None, ["v_proj"]], ids=["by model type", "by name"])
def test_layers_to_transform(model_class: type, target_modules: list[str] | None) -> None:
    options = {"target_modules": target_modules, "layers_to_transform": [0, 2]}
    assert steered_blocks(adapted(tiny_model(model_class), **options)) == [0, 2]


def test_one_layer_to_transform_has_fewer_parameters() -> None:
    all_blocks, one = (adapted(tiny_model(tf.ViTModel), layers_to_transform=blocks) for blocks in (None, 0))
    assert steered_blocks(one) == [0]
    assert one.get_nb_trainable_parameters()[0] < all_blocks.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("excluded", [["layers.1.self_attn.v_proj"], r".*layers\.1\..*"], ids=["list", "regex"])
@pytest.mark.filterwarnings("error:You have passed exclude_modules")
def test_exclude_modules(excluded: list[str] | str) -> None:
    assert steered_blocks(adapted(tiny_model(tf.LlamaForCausalLM), exclude_modules=excluded)) == [0, 2, 3]


# ---------------------------------------------------------------------------------- with other trained modules


@pytest.mark.parametrize("names", [["vit.layernorm"], ["layers.1.mlp"], ["layers.2.attention.o_proj", "classifier"]])
def test_modules_to_save_take_part_in_both_passes(names: list[str]) -> None:
    """What is trained besides the feedback is used in both passes, a final norm also for the features."""
    base = tiny_model(tf.ViTForImageClassification)
    model = steered(copy.deepcopy(base), modules_to_save=names)
    before = output_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.3)
                original = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
                base.get_parameter(original).add_(0.3)
        expected = reference_forward(base, model, inputs_of(base))[0]
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- any other model


class HandMadeModel(tf.PreTrainedModel):
    """An encoder that no library knows, with keyword arguments, tuple outputs and no final norm."""

    config_class = tf.PretrainedConfig
    main_input_name = "input_ids"

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_queries, self.to_keys, self.to_values = (nn.Linear(16, 16) for _ in range(3))
            self.mlp = nn.Linear(16, 16)

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            q, k, v = self.to_queries(hidden_states), self.to_keys(hidden_states), self.to_values(hidden_states)
            attended = hidden_states + nn.functional.scaled_dot_product_attention(q, k, v)
            return (attended + self.mlp(attended).tanh(),)

    def __init__(self, config: tf.PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(40, 16)
        self.stages = nn.ModuleList(self.Block() for _ in range(3))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutput:
        hidden_states = self.embed(input_ids)
        for block in self.stages:
            (hidden_states,) = block(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)


def opt() -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
        )
    ).eval()


def hand_made() -> nn.Module:
    return HandMadeModel(tf.PretrainedConfig()).eval()


OTHERS = {"opt": (opt, ["v_proj"]), "hand-made": (hand_made, r"stages\.\d+\.to_values")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_by_target_modules(name: str, variant: str) -> None:
    build, target_modules = OTHERS[name]
    base = build()
    inputs = {"input_ids": torch.randint(3, 40, (2, 6))}
    expected = output_of(base, inputs)
    options = VARIANTS[variant] | ({"feedback_from": 2} if "feedback_from" in VARIANTS[variant] else {})
    model = adapted(base, target_modules=target_modules, **options)
    assert torch.equal(output_of(model, inputs), expected)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "topdown_linear2" in key:
                parameter.normal_()
    outputs = [output_of(model, inputs)]
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if "topdown_prompt" in key).neg_()
    outputs.append(output_of(model, inputs))
    assert not all(torch.equal(output, expected) for output in outputs)


def test_one_tower_of_two_is_chosen_by_target_modules() -> None:
    """CLIP has a text tower and a vision tower with the same names."""
    towers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = tf.CLIPConfig(
        vision_config=towers | {"image_size": 8, "patch_size": 4},
        text_config=towers | {"vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1},
        projection_dim=32,
    )
    model = adapted(tf.CLIPModel(config), target_modules=r"vision_model\..*v_proj")
    names = {name for name, _ in model.named_parameters() if "topdown_" in name}
    assert names and all(".vision_model." in name for name in names)


# -------------------------------------------------------------------------------------------- with another method


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_on_top_of_injected_lora(model_class: type) -> None:
    """LoRA below stays in effect, also where it wraps the value projections, and every block gets its feedback."""
    base = tiny_model(model_class)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = inject_adapter_in_model(lora, base, adapter_name="below")
    expected = output_of(base)
    model = adapted(base)
    assert steered_blocks(model) == list(range(NUM_BLOCKS))
    assert torch.equal(output_of(model), expected)
    steer(model)
    assert not torch.allclose(output_of(model), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_on_top_of_merged_lora(model_class: type) -> None:
    lora = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    merged = get_peft_model(tiny_model(model_class), lora).merge_and_unload()
    expected = output_of(merged)
    assert not torch.allclose(expected, output_of(tiny_model(model_class)))
    assert torch.equal(output_of(adapted(merged)), expected)


def test_same_config_object_serves_two_models() -> None:
    config = TopDownConfig()
    models = [get_peft_model(tiny_model(model_class), config) for model_class in VIT_AND_LLAMA]
    for model in models:
        assert model(**inputs_of(model))[0].isfinite().all()
    assert [model.peft_config["default"].backbone_type for model in models] == ["vit", "llama"]

"""What the config of a tiny model needs that the names of its fields do not tell, by model type."""

from typing import Any

from transformers import ResNetConfig

_STAGES = {"out_indices": [1, 2, 3, 4]}  # of a backbone with four blocks
_TOKENS_OF_STAGES = _STAGES | {"reshape_hidden_states": False}
_DPT = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_config": _TOKENS_OF_STAGES}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_DAC = {"downsampling_ratios": [8, 5, 4, 2], "upsampling_ratios": [8, 5, 4, 2]}
_HUBERT = {"conv_dim": (16,) * 7, "conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_kernel": (10, 3, 3, 3, 3, 2, 2)}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_LAYER = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_SAM = {"vision_config": {"output_channels": 32, "num_pos_feats": 16}}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 32], "depths": [1] * 4}
_PYRAMID = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "backbone_config": _STAGES}
# Kernel, stride and padding of the convolutions of a text detector.
_STRIPES = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        name: convolution
        for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
        for name, convolution in (
            (f"vertical_long_to_small_conv_{ratio}ratio", [[size, 1], 1, [size // 2, 0]]),
            (f"horizontal_small_to_long_conv_{ratio}ratio", [[1, size], 1, [0, size // 2]]),
            (f"symmetric_conv_long_{ratio}ratio", [size, 1, size // 2]),
        )
    },
}
_TEXT_DETECTOR = {"intraclass_block_config": _STRIPES, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]}
_MAPS = [[16, 16], [8, 8], [4, 4]]  # of an image of 64 x 64 pixels
_INDEXER = {f"indexer_{name}": size for name, size in (("n_heads", 2), ("kv_heads", 1), ("head_dim", 8))}

# A dict for a config inside of another is added to that one's small sizes.
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"vision_config": {"hidden_dim": 640, "depth_coefficient": 0.1}, "projection_dim": 640},
    "apertus1p5": {
        "text_config": {"vocab_size": 99},
        "vision_config": {"codebook_size": 8},
        "audio_config": {"codebook_size": 8, "codebook_dim": 32},
        "image_token_offset": 72,
        "audio_token_offset": 80,
    },
    "autoformer": _SERIES | {"label_length": 4},
    "blip-2": {"num_query_tokens": 4, "image_token_id": 64},
    "bridgetower": {
        "hidden_size": 64,
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
        "num_hidden_layers": 2,
    },
    "bros": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 64}, "vq_config": {"base_channels": 32}},
    "chmv2": {
        "backbone_config": _STAGES | {"return_class_token": True, "reshape_hidden_states": True},
        "post_process_channels": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "head_hidden_size": 8,
        "number_output_channels": 8,
    },
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
        }
    },
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_LAYER},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    "d_fine": {"backbone_config": {"out_indices": [2, 3, 4]}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    **dict.fromkeys(["depth_anything", "prompt_depth_anything"], _DPT | {"reassemble_hidden_size": 32}),
    "dia_decoder": {"cross_hidden_size": 32, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4},
    "diffusion_gemma": {"text_config": {"top_k_experts": 2, "num_experts": 4}},
    "dory": {"sliding_window": 64},
    "emu3": {"vocabulary_map": {"<image>": 64}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "exaone4_5_vision": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "fastspeech2_conformer_hifigan": {"upsample_initial_channel": 16},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4}},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "num_attention_heads": 4, "encoder_hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "hgnet_v2": {
        "hidden_sizes": [8, 16, 16, 32],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 16],
        "stage_mid_channels": [8] * 4,
        "stage_out_channels": [8, 16, 16, 32],
        "stage_num_blocks": [1] * 4,
        "stage_numb_of_layers": [1] * 4,
    },
    "informer": _SERIES | {"label_length": 4},
    "instructblip": {"num_query_tokens": 4, "image_token_id": 64},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_id": 64},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"vision_config": {"projector_input_dim": 32}},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": _STAGES | {"num_windows": 4, "pretrain_image_size": 32, "window_block_indices": [0]},
    "mask2former": _PYRAMID,
    "mimi": {"num_filters": 4},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemo_speechlm": {"word_timestamp_config": {"num_attention_heads": 4}},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neomme": {"rope_parameters": _ROPE_BY_LAYER},
    "omdet-turbo": {
        "backbone_config": ResNetConfig(**_RESNET, out_indices=[2, 3, 4]),
        "encoder_in_channels": [8, 16, 32],
        "apply_layernorm_after_vision_backbone": False,
        "text_projection_in_dim": 32,
        "text_projection_out_dim": 32,
        "class_embed_dim": 32,
        "vision_features_channels": [16, 16, 16],
        "encoder_hidden_dim": 16,
        "decoder_hidden_dim": 16,
    },
    "oneformer": _PYRAMID,
    "perceiver": {
        "num_latents": 6,
        "d_latents": 32,
        "num_self_attends_per_block": 4,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "pe_audio_encoder": {"dac_config": {"encoder_hidden_size": 4, "hidden_size": 64}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 32}},
    **dict.fromkeys(["pp_ocrv5_server_det", "pp_ocrv6_medium_det"], _TEXT_DETECTOR),
    "pvt_v2": {"image_size": 64, "hidden_sizes": [8, 16, 40, 64], "depths": [1] * 4},
    "qwen2_5_omni": {"token2wav_config": {"bigvgan_config": {"upsample_initial_channel": 64}}},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}}
    },
    "qwen4_exp_text": _INDEXER | {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True},
    "rt_detr_resnet": _RESNET,
    "sam": _SAM,
    "sam2": {
        "vision_config": {
            "backbone_channel_list": [256, 128, 64, 32],
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": _MAPS,
        }
    },
    "sam2_hiera_det_model": {
        "embed_dim_per_stage": [32, 64, 128, 256],
        "blocks_per_stage": [1, 2, 2, 1],
        "global_attention_blocks": [4],
    },
    "sam3_tracker": {"vision_config": {"fpn_hidden_size": 32, "backbone_feature_sizes": _MAPS}},
    "sam_hq": _SAM | {"mask_decoder_config": {"vit_dim": 32}},
    "seggpt": {"image_size": (64, 32), "pretrain_image_size": 32},
    "superglue": {
        "keypoint_encoder_sizes": [8, 16, 32],
        "keypoint_detector_config": {"descriptor_decoder_dim": 32},
    },
    "swin": {
        "image_size": 64,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [2, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "time_series_transformer": _SERIES,
    "tipsv2_dpt": _DPT,
    "tvp": {"max_img_size": 128, "visual_prompt_size": 8, "backbone_config": _RESNET},
    "upernet": {"backbone_config": _STAGES},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "vitmatte": {"fusion_hidden_sizes": [16, 8, 8, 8], "convstream_hidden_sizes": [8, 8, 8]},
    "vitpose_backbone": {"image_size": [32, 32], "patch_size": [8, 8], "part_features": 8, "num_experts": 1},
    "xcodec": {"acoustic_model_config": _DAC, "semantic_model_config": _HUBERT},
    "zoedepth": _DPT | {"bottleneck_features": 8},
}

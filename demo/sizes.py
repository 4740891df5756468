"""The sizes of the demos' models: tiny, in the real architectures."""

# The usual 0.02 is meant for widths in the thousands; here it would mute every layer.
INITIALIZER_RANGE = 0.1
TEXT = {  # the language model, of all
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
CLIP = {
    "hidden_size": 96,
    "num_hidden_layers": 3,  # features are read after the second last, as in every LLaVA
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 72,
    "patch_size": 9,  # 72 / 9 = GRID
}
QWEN2VL_VISION = {
    "depth": 3,
    "embed_dim": 64,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,  # 224 / (14 * 2) = GRID
    "temporal_patch_size": 2,
}
GPT2 = {
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
DINOV2 = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 112,
    "patch_size": 7,
    "initializer_range": 0.15,
}

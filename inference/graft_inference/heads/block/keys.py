"""The keys of a block head's configuration in all dialects: which are read, and which must have one value."""

from ..checkpoint import NESTED, OF_SPECULATORS, SPECULATORS

DFLASH, DSPARK, OF_SPECFORGE = "DFlashDraftModel", "Qwen3DSparkModel", "DSparkDraftModel"
ARCHITECTURES = (DFLASH, DSPARK, OF_SPECFORGE)
MODEL_TYPES = ("qwen3", "qwen3_vl_text", "dspark")
"""Names of configurations whose layers are Qwen3's."""
TYPES = ("dflash", "dspark")
"""`speculators_model_type` of the block heads that can be read."""
LAYOUT = "sample_from_anchor"
TIED = "tie_word_embeddings"
"""Said of the target's embeddings and lm_head; `checkpoint.py` refuses it of the head's own."""
FROM_ANCHOR = "sliding_window_from_anchor"
"""A key of our own, beside `sliding_window`: the dialect has no other for how speculators counts."""
FULL, SLIDING = "full_attention", "sliding_attention"
READ = frozenset({
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
    "num_target_layers", "block_size", "is_causal", LAYOUT, "dflash_config", "target_layer_ids", "mask_token_id",
    "dspark_config", "target_hidden_size", "markov_rank", "enable_confidence_head", FROM_ANCHOR,
})  # fmt: skip
"""Keys that what is computed is read from."""
COMPUTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "is_neox_style": True,
    "markov_head_type": "vanilla",
}
"""Keys that change what is computed, each with the value that this module computes; null and absent mean it too."""
OF_TRAINING = frozenset({
    "confidence_head_with_markov", "confidence_head_alpha", "num_anchors", "loss_decay_gamma", TIED,
})  # fmt: skip
COMPUTED_NESTED = {
    "attention_mode": "gqa",
    "markov_head_type": "vanilla",
    "attention_sink_bias": False,
    "attention_value_scale": 1,
    "input_embedding_scale": 1,
    "output_multiplier": 1,
}
READ_NESTED = frozenset({
    "target_layer_ids", "mask_token_id", "block_size", "causal", "causal_head", "use_swa", "swa_window_size",
    "markov_rank", "enable_confidence_head", LAYOUT,
})  # fmt: skip
"""Both within dflash_config and dspark_config."""
AUX_IDS, NON_CAUSAL = "aux_hidden_state_layer_ids", "sliding_window_non_causal"
READ_OF_SPECULATORS = frozenset({
    "architectures", "block_size", "draft_vocab_size", "enable_confidence_head", "markov_rank", "mask_token_id",
    "target_hidden_size", LAYOUT, SPECULATORS, AUX_IDS, NON_CAUSAL, NESTED,
})  # fmt: skip
LAYER = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps",
    "attention_bias", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype",
    "layer_types", "sliding_window", "use_sliding_window",
)  # fmt: skip
"""Native keys that speculators' dialect nests."""
ONLY_OF_SPECULATORS = frozenset({*OF_SPECULATORS, AUX_IDS, NON_CAUSAL})
"""Keys that the native dialect does not have."""

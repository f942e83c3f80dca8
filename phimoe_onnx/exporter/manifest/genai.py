"""genai_config.json, which makes a bundle run in onnxruntime-genai unchanged."""

from __future__ import annotations

from typing import Any

from phimoe_onnx import bundle
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.manifest.decoding import eos_token_ids
from phimoe_onnx.exporter.target import Target


def genai_config(config: PhiMoEConfig, generation: dict[str, Any], graph_file: str, target: Target) -> dict[str, Any]:
    """The contents of genai_config.json for a text-generation bundle.

    Args:
        config: the model's shape.
        generation: generation_config.json, whose token ids go before config.json's.
        graph_file: the graph to load.
        target: one that onnxruntime-genai runs.
    """
    eos = list(eos_token_ids(config, generation))
    return {
        "model": {
            "type": "phimoe",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "bos_token_id": generation.get("bos_token_id", config.bos_token_id),
            "eos_token_id": eos,
            "pad_token_id": generation.get("pad_token_id", eos[0] if eos else 0),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": list(target.genai or ())},
                "filename": graph_file,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {
                    "input_ids": bundle.INPUT_IDS,
                    "attention_mask": bundle.ATTENTION_MASK,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": bundle.LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": target.shared_cache,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }

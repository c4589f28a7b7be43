"""Networks that people fine-tune: the families of the package transformers, small and with random weights.

Nothing is downloaded: each model is made from a configuration. `pip install transformers` first.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sample import Sample
from torch import Tensor


def is_installed() -> bool:
    """Whether transformers is there."""
    return importlib.util.find_spec("transformers") is not None


def transformers_models() -> dict[str, Callable[[], Sample]]:
    """One model of each family, by name."""
    return {name: partial(_make, *what) for name, what in _MODELS.items()}


_WORDS, _BATCH, _LENGTH, _SIDE = 40, 2, 7, 16


def _words(length: int = _LENGTH) -> Tensor:
    return torch.randint(3, _WORDS, (_BATCH, length))  # no padding, and no end of a text


def _text(**options: Any) -> dict[str, Any]:
    """Two texts, the second of which is shorter."""
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": _words(), "attention_mask": mask, **options}


def _pair() -> dict[str, Any]:
    return _text(decoder_input_ids=_words(4), use_cache=False)


def _images(side: int = _SIDE) -> dict[str, Any]:
    return {"pixel_values": torch.randn(_BATCH, 3, side, side)}


_causal = partial(_text, use_cache=False)
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
# Most families call these sizes so.
_ENCODER = {
    "vocab_size": _WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_PAIR = {
    "vocab_size": _WORDS,
    "d_model": 16,
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 24),
    "max_position_embeddings": 16,
}
_IMAGE = {
    **{name: _ENCODER[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 24,
    "image_size": _SIDE,
    "patch_size": 4,
}

_MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    # Encoders of text
    "BERT": ("Bert", "ForSequenceClassification", _ENCODER, _text),
    "RoBERTa": ("Roberta", "ForMaskedLM", _ENCODER, _text),
    "DistilBERT": (
        "DistilBert",
        "ForSequenceClassification",
        {
            "vocab_size": _WORDS,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "max_position_embeddings": 16,
        },
        _text,
    ),
    "ALBERT": ("Albert", "ForSequenceClassification", {**_ENCODER, "embedding_size": 8}, _text),
    "ELECTRA": ("Electra", "ForTokenClassification", {**_ENCODER, "embedding_size": 8}, _text),
    "DeBERTa-v2": (
        "DebertaV2",
        "ForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        _text,
    ),
    "MPNet": ("MPNet", "ForSequenceClassification", _ENCODER, _text),
    "XLNet": (
        "XLNet",
        "ForSequenceClassification",
        {"vocab_size": _WORDS, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24},
        partial(_text, use_mems=False),
    ),
    "Funnel": (
        "Funnel",
        "ForSequenceClassification",
        {
            **{"vocab_size": _WORDS, "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 24},
            **{"block_sizes": [1, 1], "num_decoder_layers": 1},
        },
        _text,
    ),
    "ModernBERT": (
        "ModernBert",
        "ForSequenceClassification",
        {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        _text,
    ),
    # Decoders
    "GPT-2": ("GPT2", "LMHeadModel", {"vocab_size": _WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4, **_ENDS}, _causal),
    "GPT-Neo": (
        "GPTNeo",
        "ForCausalLM",
        {
            **{"vocab_size": _WORDS, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24},
            **_ENDS,
            **{"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 16},
        },
        _causal,
    ),
    "GPT-NeoX": ("GPTNeoX", "ForCausalLM", _ENCODER, _causal),
    "OPT": (
        "OPT",
        "ForCausalLM",
        {
            **{"vocab_size": _WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
        },
        _causal,
    ),
    "LLaMA": ("Llama", "ForCausalLM", _DECODER, _causal),
    "Mistral": ("Mistral", "ForCausalLM", {**_DECODER, "sliding_window": 4}, _causal),
    "Mixtral": ("Mixtral", "ForCausalLM", {**_DECODER, **_EXPERTS}, _causal),
    "Mixtral, eager": ("Mixtral", "ForCausalLM", {**_DECODER, **_EXPERTS, "experts_implementation": "eager"}, _causal),
    "Mixtral, batched_mm": (
        "Mixtral",
        "ForCausalLM",
        {**_DECODER, **_EXPERTS, "experts_implementation": "batched_mm"},
        _causal,
    ),
    "Qwen2": ("Qwen2", "ForCausalLM", _DECODER, _causal),
    "Qwen2-MoE": (
        "Qwen2Moe",
        "ForCausalLM",
        {
            **_DECODER,
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
            **{"shared_expert_intermediate_size": 12, "experts_implementation": "batched_mm"},
        },
        _causal,
    ),
    "Qwen3": ("Qwen3", "ForCausalLM", {**_DECODER, "head_dim": 4}, _causal),
    "GPT-OSS": (
        "GptOss",
        "ForCausalLM",
        {**_DECODER, **_EXPERTS, "head_dim": 4, "experts_implementation": "batched_mm"},
        _causal,
    ),
    "Gemma": ("Gemma", "ForCausalLM", {**_DECODER, "head_dim": 4}, _causal),
    "Phi": ("Phi", "ForCausalLM", _DECODER, _causal),
    "Falcon": (
        "Falcon",
        "ForCausalLM",
        {"vocab_size": _WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
        _causal,
    ),
    "BLOOM": ("Bloom", "ForCausalLM", {"vocab_size": _WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 4}, _causal),
    "Mamba": (
        "Mamba",
        "ForCausalLM",
        {"vocab_size": _WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        lambda: {"input_ids": _words(), "use_cache": False},
    ),
    # Encoders with decoders
    "T5": (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": _WORDS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
        _pair,
    ),
    "BART": ("Bart", "ForConditionalGeneration", _PAIR, _pair),
    "Pegasus": ("Pegasus", "ForConditionalGeneration", _PAIR, _pair),
    "Whisper": (
        "Whisper",
        "ForConditionalGeneration",
        {
            **{name: size for name, size in _PAIR.items() if name != "max_position_embeddings"},
            **{"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
        lambda: {
            "input_features": torch.randn(_BATCH, 8, 20),
            "decoder_input_ids": _words(4),
            "use_cache": False,
        },
    ),
    # Images and sound
    "ViT": ("ViT", "ForImageClassification", _IMAGE, _images),
    "DeiT": ("Deit", "ForImageClassification", _IMAGE, _images),
    "BEiT": ("Beit", "ForImageClassification", {**_IMAGE, "use_relative_position_bias": True}, _images),
    "Swin": (
        "Swin",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        partial(_images, 32),
    ),
    "ConvNeXt": (
        "ConvNext",
        "ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32, "drop_path_rate": 0.1},
        partial(_images, 32),
    ),
    "CLIP": (
        "CLIP",
        "Model",
        {
            "text_config": {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            "vision_config": _IMAGE,
            "projection_dim": 8,
        },
        lambda: {**_text(), **_images()},
    ),
    "Wav2Vec2": (
        "Wav2Vec2",
        "ForCTC",
        {
            **{name: size for name, size in _ENCODER.items() if name != "max_position_embeddings"},
            **{"conv_dim": [8, 8], "conv_kernel": [10, 4], "conv_stride": [5, 2], "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
        },
        lambda: {"input_values": torch.randn(_BATCH, 400)},
    ),
}
"""By family: the start of the names of its classes, the end of that of the model, its configuration, and inputs."""


def _make(start: str, end: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Sample:
    with warnings.catch_warnings(action="ignore"):
        transformers = importlib.import_module("transformers")
        start = next(name for name in dir(transformers) if name.lower() == f"{start}config".lower())[: -len("Config")]
        options = dict(options)
        experts = options.pop("experts_implementation", None)
        config = getattr(transformers, f"{start}Config")(**options)
        if experts is not None:  # the default one, grouped_mm, cannot compute in float64
            config._experts_implementation = experts
        return Sample(getattr(transformers, f"{start}{end}")(config), (), inputs())

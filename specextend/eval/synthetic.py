"""Models of any shape with random weights, for real latency where there are no checkpoints."""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel


def _llama(hidden, intermediate, layers, heads, kv_heads, vocab, head_dim=128) -> dict:
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        head_dim=head_dim,
    )  # fmt: skip


#: fields of a ``LlamaConfig`` by name, from the models' own configurations
SHAPES = {
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64),
    "vicuna-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "vicuna-68m": _llama(768, 3072, 2, 12, 12, 32000, head_dim=64),
    "small": _llama(512, 1536, 4, 4, 2, 8192),
}


def random_model(
    shape: str | os.PathLike,
    positions: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes,
) -> PreTrainedModel:
    """A model with random weights, drawn from torch's default generator; nothing ends its text.

    Args:
        shape: a name of ``SHAPES``; a ``config.json``, a folder that has one, or a hub id, of which
            the configuration alone is read.
        positions: prompt and output together, at most.
        **changes: fields of the configuration.
    """
    changes = {"eos_token_id": None, **changes}
    if shape in SHAPES:
        config = LlamaConfig(**{**SHAPES[shape], **changes})
    else:
        try:
            config = AutoConfig.from_pretrained(shape, **changes)
        except OSError as error:
            raise ValueError(
                f"a shape is one of {', '.join(SHAPES)}, or a model's configuration (a file, a "
                f"folder or a hub id); got {str(shape)!r}: {error}"
            ) from error
    text = config.get_text_config()
    text.max_position_embeddings = max(text.max_position_embeddings or 0, positions)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()

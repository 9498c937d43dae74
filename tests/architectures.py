"""The one table of architectures that the tests run: adding a row adds all tests."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

# Small, but with everything that matters: grouped heads, a head size that vLLM's CPU attention takes, two blocks.
SHAPE = {
    "vocab_size": 259,  # of the byte-level tokenizer
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture; ``compiled``: run in vLLM compiled too, which takes most of a minute each."""

    name: str
    config: Callable[[], PretrainedConfig]
    compiled: bool = True

    def model(self, seed: int):
        """A float32 model with random weights, large enough that routing and logits differ between tokens."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at 1 and 0
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model


TABLE = [
    Architecture("llama", lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    Architecture("qwen2", lambda: Qwen2Config(**_without_head_dim(), tie_word_embeddings=True)),  # biases on q, k, v
    Architecture("mistral", lambda: MistralConfig(**SHAPE, sliding_window=None, tie_word_embeddings=False)),
    Architecture(
        "gpt2",  # Conv1D, biases everywhere, fused q, k, v
        lambda: GPT2Config(
            vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=1
        ),
        compiled=False,
    ),
    Architecture("gemma2", lambda: Gemma2Config(**SHAPE, query_pre_attn_scalar=32), compiled=False),
]


def _without_head_dim() -> dict:
    return {**{k: v for k, v in SHAPE.items() if k != "head_dim"}, "hidden_size": 128}

"""Running means over each request's prefix, by an attention layer that weighs all tokens alike.

With keys and queries of zero, attention averages its values; the engine's own key-value cache keeps the state, so that
the means are exact under continuous batching, chunked prefill, prefix caching and preemption.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.attention import Attention

_DIGIT = 128  # positions are split into digits that 16-bit formats hold exactly


class AttentionMean(nn.Module):
    """The running mean of as many values as the key-value heads hold, plain or decaying.

    It is one attention layer more of the model's own kind, to the engine: it has the heads, the cache and, for a plain
    mean, whose scores are all 0, even the cap of ``like``, so that kernels that are planned for the layers of one kind
    together take it too.

    For a decaying mean, a token's score is its position times ``log(2) / half_life``: among the tokens of one softmax
    only differences count, so that an older token has half the weight for every ``half_life`` tokens of age.
    """

    def __init__(self, like: Any, width: int, half_life: float | None, prefix: str):
        super().__init__()
        self.queries, self.keys, self.size = like.num_heads, like.num_kv_heads, like.head_size
        if width > self.keys * self.size:
            raise ValueError(
                f"{prefix}: the means of {width} values a token do not fit the model's {self.keys} key-value heads of "
                f"{self.size}; build with a smaller --rank, or other --vectors than rank-one"
            )
        self.width, self.half_life, self.scale = width, half_life, float(like.impl.scale)
        self.attention = Attention(
            self.queries,
            self.size,
            self.scale,
            num_kv_heads=self.keys,
            cache_config=None,
            logits_soft_cap=(getattr(like.impl, "logits_soft_cap", None) or None) if half_life is None else None,
            prefix=prefix,
        )

    def forward(self, values: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Means [T, C] in float32 of ``values`` [T, C] at ``positions`` [T]; the cache holds them in ``dtype``."""
        padded = F.pad(values, (0, self.keys * self.size - self.width)).to(dtype)
        key, query = torch.zeros_like(padded), padded.new_zeros(len(positions), self.queries * self.size)
        if self.half_life is not None:
            digits = torch.stack([positions % _DIGIT, positions // _DIGIT % _DIGIT, positions // _DIGIT**2], dim=-1)
            weights = digits.new_tensor([1, _DIGIT, _DIGIT**2]) * (0.6931471805599453 / self.half_life / self.scale)
            key = self._in_every_head(digits.to(dtype), self.keys)
            query = self._in_every_head(weights.to(dtype).expand(len(positions), 3), self.queries)
        means = self.attention(query, key, padded).unflatten(-1, (self.keys, -1, self.size))
        return means[:, :, 0].flatten(1)[:, : self.width].float()  # the queries of a key-value head agree

    def _in_every_head(self, x: Tensor, heads: int) -> Tensor:
        return F.pad(x, (0, self.size - x.shape[-1])).repeat(1, heads)


def attention_like(model: nn.Module) -> Any:
    """An attention layer of the model to follow in shape: one over the full context where there is one.

    Raises:
        ValueError: the model has none, or of a kind that keeps no keys and values.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError("a router over the prefix needs a model with plain attention layers in vLLM")
    return next((layer for layer in layers if layer.sliding_window is None), layers[0])

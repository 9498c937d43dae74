"""The calibrated router: a linear classifier of prompts, fitted on a few of each expert.

Symbols: ``T`` tokens, ``E`` experts, ``C`` classes (the experts and perhaps the base), ``V`` vocabulary, ``d`` hidden
size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layout_upscaled import ModuleLayout
from .router_upscaled import Router, sparse


class CalibratedRouter(Router):
    """A gate for the whole model, fitted in closed form on a few prompts of each expert (``upscale calibrate``).

    ``softmax(mean of scores + bias)`` over the classes, then top-k; the scores are linear in what a token looks like to
    the base. At depth 0 that is its embedding, so that ``table`` [V, C] holds the scores of all tokens, and routing is
    known before the first layer. At a later depth it is the hidden state that enters that block, scaled to root mean
    square 1, and ``weight`` [C, d] scores it; modules before it run as the base's. The last class is the base, if
    ``base``: what goes to it goes to no expert.

    ``granularity`` says what the mean is of. "prompt": of all tokens of the prompt, held for the prompt and its answer,
    so that even the first token is served by the expert that the last one reveals; depth 0 only. "prefix": of the
    tokens so far, so that routing may change in the middle.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleLayout],
        experts: int,
        size: int,
        depth: int = 0,
        granularity: str = "prompt",
        base: bool = True,
        top_k: int | None = 1,
        half_life: float | None = None,
    ):
        super().__init__()
        self.depth, self.granularity, self.experts = depth, granularity, experts
        self.top_k, self.half_life = top_k, half_life
        classes = experts + base
        self.sites = {"gate": classes}
        if depth == 0:
            self.table = _frozen(size, classes)
        else:
            self.weight = _frozen(classes, size)
        self.bias = _frozen(classes)

    def watches(self, depth: int) -> bool:
        """See Router."""
        return depth == self.depth

    def read(self, tokens: Tensor) -> None:
        """See Router."""
        scores = F.embedding(tokens, self.table.float())
        means = self.whole("gate", scores) if self.granularity == "prompt" else self.mean("gate", scores)
        self.decided = self.weights(means)

    def enter(self, depth: int, hidden: Tensor) -> None:
        """See Router."""
        # The mean is taken of C scores instead of d features: both are linear, so their order does not matter.
        self.decided = self.weights(self.mean("gate", unit_rms(hidden) @ self.weight.float().T))

    def forward(self, name: str, x: Tensor, z: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
        """See Router."""
        return self.decided

    def weights(self, means: Tensor) -> Tensor:
        """Means of scores [..., C] -> weights of the experts [..., E], float32."""
        return sparse(self.posterior(means), self.top_k)[..., : self.experts]

    def posterior(self, means: Tensor) -> Tensor:
        """Means of scores [..., C] -> probabilities of the classes [..., C], float32."""
        return (means + self.bias.float()).softmax(dim=-1)


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


def unit_rms(hidden: Tensor) -> Tensor:
    """Hidden states [..., d] in float32, each scaled to root mean square 1: no token outweighs the others."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + 1e-12)

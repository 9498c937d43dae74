"""The routers: what decides which experts a token meets.

Symbols: ``B`` sequences, ``T`` tokens, ``E`` experts, ``C`` the router's classes (the experts and perhaps the base),
``R`` the sum of the ranks, ``d`` hidden size.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixture_upscaled import ModuleLayout

Mean = Callable[[str, Tensor], Tensor]  # (site, values [..., T, C]) -> their running means over each sequence's prefix


def energies(z: Tensor, ranks: Sequence[int], k: int) -> Tensor:
    """The norm of each expert's first ``k`` projections: ``z`` [..., R] -> [..., E], float32.

    An idle expert (rank 0: it did not change this linear) gets -inf, so that it never wins a token.
    """
    z = z.float()
    if len(set(ranks)) == 1 and ranks[0] > 0:
        return torch.linalg.vector_norm(z.unflatten(-1, (len(ranks), ranks[0]))[..., :k], dim=-1)
    idle = z.new_full(z.shape[:-1], -torch.inf)
    parts = z.split(list(ranks), dim=-1)
    return torch.stack([torch.linalg.vector_norm(p[..., :k], dim=-1) if p.shape[-1] else idle for p in parts], dim=-1)


def sparse(p: Tensor, top_k: int | None) -> Tensor:
    """Keep the ``top_k`` largest of ``p`` [..., C] and divide by their sum; None keeps all."""
    if top_k is None or top_k >= p.shape[-1]:
        return p
    top, index = p.topk(top_k, dim=-1)
    return torch.zeros_like(p).scatter(-1, index, top / top.sum(dim=-1, keepdim=True))


class Router(nn.Module):
    """What the two routers share: how a pass goes by.

    The runtime calls ``start`` when a pass begins; where ``watches(depth)`` says so, ``read`` with the tokens (depth 0)
    and ``enter`` with the hidden states that enter block ``depth``; and the router itself for each linear.

    Attributes:
        sites: width of the values averaged over the prefix, by the name of the place.
        half_life: tokens after which a token counts half in those means; None for plain means.
        mean: the runtime's running mean over each sequence's prefix, exact under batching and caching.
        whole: the runtime's mean over each sequence's prompt, for every token of the prompt and after it.
        decided: [..., T, E], what the modules without projections and the output head are given; None for no expert.
    """

    mean: Mean
    whole: Mean
    decided: Tensor | None
    half_life: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, int] = {}
        self.decided = None

    @property
    def shared(self) -> bool:
        """Whether it decides for other modules than the one it looks at, the output head among them."""
        return True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the router's own tensors."""
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def start(self) -> None:
        """Forget the pass before."""
        self.decided = None

    def watches(self, depth: int) -> bool:
        """Whether to be shown the tokens (depth 0) or what enters block ``depth``."""
        raise NotImplementedError

    def read(self, tokens: Tensor) -> None:
        """See the tokens of the pass: [..., T] int."""

    def enter(self, depth: int, hidden: Tensor) -> None:
        """See what enters a block: [..., T, d]."""

    def forward(self, name: str, z: Tensor, ranks: Sequence[int]) -> Tensor | None:
        """Weights [..., E] of a linear with projections ``z`` [..., R], at most ``top_k`` of them non-zero, or None."""
        raise NotImplementedError


class ProjectionRouter(Router):
    """SMILE's zero-shot router (arXiv 2408.10174, section 4): softmax over the norms of the projections, then top-k.

    It has no weights: the first ``rank`` rows of an expert's ``down`` are the router's vectors. As published it decides
    in every linear and for every token alone. Beyond the paper:

    - ``scope``: how far back evidence is gathered: this "linear", the linears of this "block" so far, or those of the
      whole "model" so far.
    - ``granularity``: "token", or the mean over the "prefix" of the sequence.
    - ``standardise``: divide each linear's energies by their mean over the experts, so that linears and tokens of
      large activations do not drown the others. Scopes beyond the linear always do.

    An output head is always judged token by token: engines show it some tokens only.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleLayout],
        rank: int,
        top_k: int,
        scope: str = "linear",
        granularity: str = "token",
        standardise: bool = False,
    ):
        super().__init__()
        self.rank, self.top_k, self.scope = rank, top_k, scope
        self.standardise = standardise or scope != "linear"
        inside = {name: m for name, m in modules.items() if any(m.ranks) and in_block(name)}
        if granularity == "prefix":
            self.sites = {name: len(m.ranks) for name, m in inside.items()}
        self.inside = frozenset(inside)
        self.evidence: Tensor | None = None

    @property
    def shared(self) -> bool:
        """See Router."""
        return self.scope != "linear"

    def start(self) -> None:
        """See Router."""
        super().start()
        self.evidence = None

    def watches(self, depth: int) -> bool:
        """See Router."""
        return self.scope == "block" and depth > 0

    def enter(self, depth: int, hidden: Tensor) -> None:
        """See Router."""
        self.evidence = None

    def forward(self, name: str, z: Tensor, ranks: Sequence[int]) -> Tensor | None:
        """See Router."""
        if len(ranks) == 1:
            return z.new_ones((*z.shape[:-1], 1), dtype=torch.float32)  # one expert: pure delta compression, always on
        gathers = self.scope != "linear"
        if gathers and name not in self.inside:
            return self.decided
        if not any(ranks):
            return None  # bias deltas alone tell nothing
        energy = energies(z, ranks, self.rank)
        if self.standardise:
            energy = _standardised(energy, ranks)
        if gathers:
            energy = energy.nan_to_num(neginf=0.0)  # idle here, perhaps not elsewhere
            # Some models flatten B and T before some linears.
            self.evidence = energy if self.evidence is None else self.evidence + energy.view(self.evidence.shape)
            energy = self.evidence
        if name in self.sites:
            # The mean is taken of finite numbers; what is idle is known without it.
            idle = energy == -torch.inf
            energy = self.mean(name, energy.masked_fill(idle, 0.0)).masked_fill(idle, -torch.inf)
        w = sparse(energy.softmax(dim=-1), self.top_k)
        if gathers:
            self.decided = w
        return w


def _standardised(energy: Tensor, ranks: Sequence[int]) -> Tensor:
    """Energies [..., E] divided by their mean over the experts that are not idle."""
    active = energy[..., [e for e, r in enumerate(ranks) if r]]
    return energy / active.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


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

    def forward(self, name: str, z: Tensor, ranks: Sequence[int]) -> Tensor | None:
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


def in_block(module: str) -> bool:
    """Whether a module lies in a numbered list of modules, a decoder block."""
    return any(part.isdigit() for part in module.split("."))


ROUTERS: dict[str, Callable[..., Router]] = {"projection": ProjectionRouter, "calibrated": CalibratedRouter}


def make_router(modules: Mapping[str, ModuleLayout], settings: Mapping) -> Router:
    """The router that ``settings`` (of ``config.json``) describes. Raises ValueError for an unknown type."""
    if (kind := settings["type"]) not in ROUTERS:
        raise ValueError(f"router {kind!r} is unknown to this version of upscale-zoo; it knows {', '.join(ROUTERS)}")
    return ROUTERS[kind](modules, **{k: v for k, v in settings.items() if k not in ("type", "tensors")})

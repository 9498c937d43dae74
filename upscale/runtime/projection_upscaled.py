"""SMILE's own router: an expert's weight follows from how much of the input its directions catch.

Symbols: ``E`` experts, ``R`` the sum of the ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout_upscaled import ModuleLayout
from .router_upscaled import Router, block, in_block, sparse


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


class ProjectionRouter(Router):
    """SMILE's zero-shot router (arXiv 2408.10174, section 4): softmax over the norms of the projections, then top-k.

    It has no weights: the first ``rank`` rows of an expert's ``down`` are the router's vectors. As published it decides
    in every linear and for every token alone. Beyond the paper:

    - ``scope``: whose evidence counts beside this "linear"'s own: that of the linears of the "block" before, or of all
      blocks before, the "model". Linears of one block do not count for each other, so that nothing depends on the order
      in which an engine runs them. The modules without projections, and the head, go by the blocks before their own.
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
        self.blocks = {name: block(name) for name, m in modules.items() if any(m.ranks) and in_block(name)}
        if granularity == "prefix":
            self.sites = {name: len(modules[name].ranks) for name in self.blocks}
        self.place: str | None = None
        self.past: Tensor | None = None  # [..., T, E] of the blocks before
        self.current: Tensor | None = None  # of this block so far

    @property
    def shared(self) -> bool:
        """See Router."""
        return self.scope != "linear"

    def start(self) -> None:
        """See Router."""
        super().start()
        self.place = self.past = self.current = None

    def watches(self, depth: int) -> bool:
        """See Router."""
        return False

    def forward(self, name: str, x: Tensor, z: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
        """See Router; at most ``top_k`` weights of a token are not 0."""
        if z is None:
            raise ValueError(f"{name}: a projection router needs low-rank experts; use the checkpoint's own router")
        if len(ranks) == 1:
            return z.new_ones((*z.shape[:-1], 1), dtype=torch.float32)  # one expert: pure delta compression, always on
        gathers = self.scope != "linear"
        if gathers and name not in self.blocks:
            return self.decided
        if not any(ranks):
            return None  # bias deltas alone tell nothing
        energy = energies(z, ranks, self.rank)
        if self.standardise:
            energy = _standardised(energy, ranks)
        if gathers:
            energy = energy.nan_to_num(neginf=0.0)  # idle here, perhaps not elsewhere
        if name in self.sites:
            # The mean is taken of finite numbers; what is idle is known without it.
            idle = energy == -torch.inf
            energy = self.mean(name, energy.masked_fill(idle, 0.0)).masked_fill(idle, -torch.inf)
        if gathers:
            energy = self._gather(self.blocks[name], energy)
        return sparse(energy.softmax(dim=-1), self.top_k)

    def _gather(self, place: str, energy: Tensor) -> Tensor:
        """Add the evidence of the blocks before."""
        if place != self.place:
            gathered = self.current
            if self.scope == "model" and self.past is not None and gathered is not None:
                gathered = self.past + gathered.view(self.past.shape)
            self.place, self.past, self.current = place, gathered, None
            self.decided = None if gathered is None else sparse(gathered.softmax(dim=-1), self.top_k)
        # Some models flatten B and T before some linears.
        self.current = energy if self.current is None else self.current + energy.view(self.current.shape)
        return energy if self.past is None else energy + self.past.view(energy.shape)


def _standardised(energy: Tensor, ranks: Sequence[int]) -> Tensor:
    """Energies [..., E] divided by their mean over the experts that are not idle."""
    active = energy[..., [e for e, r in enumerate(ranks) if r]]
    return energy / active.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

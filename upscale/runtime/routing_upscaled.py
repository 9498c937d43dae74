"""Routing: the one object that all layers of a model share, with the router or the expert that is forced.

Symbols: ``B`` sequences, ``T`` tokens, ``E`` experts, ``R`` the sum of the ranks, ``o`` out features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .projection_upscaled import ProjectionRouter
from .router_upscaled import Router

BASE = "base"  # the name that forces no expert at all


class Routing:
    """One object per model, shared by all its layers: the router, or the expert that is forced.

    Attributes:
        experts: names, the columns of all weights.
        router: decides unless an expert is forced.
        forced: [1, E], or [B, E] with a row per sequence; overrides the router.
        given: [N, E] weights of the pass's tokens, and room for more, from an engine that knows whole prompts; they
            stand for the router's.
        trace: set to {} to record the weights of a pass by module name.
        votes: [B, E], the sum of all weights of a pass for each input, once ``count_votes`` began it; None if none
            came.
    """

    def __init__(self, experts: Sequence[str], router: Router):
        self.experts, self.router = tuple(experts), router
        self.forced: Tensor | None = None
        self.given: Tensor | None = None
        self.trace: dict[str, Tensor] | None = None
        self.votes: Tensor | None = None
        self.votes_count = False

    def weights(
        self,
        name: str,
        y: Tensor,
        x: Tensor | None = None,
        z: Tensor | None = None,
        ranks: Sequence[int] = (),
        *,
        once: bool = False,
    ) -> Tensor:
        """The weights [..., E] of the module ``name``, or of each term of its experts [..., E * k].

        Args:
            name: of the module in the checkpoint.
            y: [..., o] its output, which tells the tokens.
            x: [..., i] its input; None for an embedding or a norm, which the router knows nothing of.
            z: [..., R] its projections; None if its task vectors are not low-rank.
            ranks: of each expert in ``z``.
            once: ``y`` may be one for all sequences: [1, T, o].
        """
        if self.forced is not None:
            w = self.forced.to(y.device)
            w = w.unsqueeze(1).expand(-1, y.shape[1], -1) if once and y.shape[0] == 1 else _per_sequence(w, y)
        elif self.given is not None:
            w = self.given[: y.shape[0]]
        else:
            decided = self._alone(y) if x is None else self.router(name, x, z, ranks)
            w = y.new_zeros((*y.shape[:-1], len(self.experts))) if decided is None else _fit(decided, y)
        if self.trace is not None:
            self.trace[name] = self._by_expert(w)
        if self.votes_count:
            votes = self._by_expert(w).flatten(1, -2).mean(dim=1) if w.ndim > 2 else self._by_expert(w)
            self.votes = votes if self.votes is None else self.votes + votes
        return w

    def _by_expert(self, w: Tensor) -> Tensor:
        """[..., E] of weights [..., E * k] of terms."""
        return w.detach().unflatten(-1, (len(self.experts), -1)).mean(dim=-1)

    def count_votes(self) -> None:
        """Begin to sum the weights of a pass by input."""
        self.votes, self.votes_count = None, True

    def _alone(self, y: Tensor) -> Tensor | None:
        """What a module without projections is given: a single expert is always on, as in the linears."""
        if self.router.decided is None and len(self.experts) == 1 and isinstance(self.router, ProjectionRouter):
            return y.new_ones((*y.shape[:-1], 1))
        return self.router.decided

    def one_hot(self, expert: str | Sequence[str] | None) -> Tensor | None:
        """Names -> [1, E] or [B, E]; ``"base"`` gives a row of zeros. Raises ValueError for an unknown name."""
        if expert is None:
            return None
        names = [expert] if isinstance(expert, str) else list(expert)
        if unknown := sorted({n for n in names if n not in (*self.experts, BASE)}):
            raise ValueError(
                f"no expert {', '.join(unknown)} in this model; it has {', '.join(self.experts)} and {BASE}"
            )
        return torch.tensor([[float(n == e) for e in self.experts] for n in names])


def _per_sequence(w: Tensor, y: Tensor) -> Tensor:
    """One row for all, or a row per sequence, for every token of ``y``: beams repeat a sequence's row."""
    lead = y.shape[:-1]
    if w.shape[0] == 1:
        return w.view(*[1] * len(lead), -1).expand(*lead, -1)
    rows = lead[0]  # a model that flattens B and T has all tokens here, sequence after sequence
    if rows % w.shape[0]:
        raise ValueError(f"{w.shape[0]} experts are forced, one per sequence; they do not fit {rows} sequences")
    w = w.repeat_interleave(rows // w.shape[0], dim=0)
    return w.view(rows, *[1] * (len(lead) - 1), -1).expand(*lead, -1)


def _fit(w: Tensor, y: Tensor) -> Tensor:
    """What a router decided for [B, T], for an output that may be of the last tokens alone, or flattened."""
    if w.ndim == 3 and y.ndim >= 3:
        w = w[:, -y.shape[1] :]
    positions = w.ndim == 3 and y.shape[0] == 1 and w.shape[1] == y.shape[1]
    if w.shape[:-1] == y.shape[: w.ndim - 1] or positions:
        return w  # positions are embedded once for all sequences
    if w.ndim == 3 and w.shape[:-1].numel() == y.shape[0]:
        return w.flatten(0, 1)
    raise ValueError(f"routing weights for {list(w.shape[:-1])} tokens do not fit an output of shape {list(y.shape)}")

"""WEMoE's router: a small network on each MLP's input says how much of every expert's task vector to add there.

Symbols: ``T`` tokens, ``E`` experts, ``k`` weights an expert (1, but for rank-one WEMoE), ``d`` width of the input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .layout_upscaled import LINEAR, ModuleLayout
from .router_upscaled import Router, block

SHARED = "shared"


class EnsemblingRouter(Router):
    """WEMoE's router (arXiv 2402.00433, section 3.3): weights ``lambda(h)`` of the task vectors, unbounded and signed.

    A network of ``depth`` layers (0: a constant; 1: linear; 2: linear of the same width, ReLU, linear) reads the input
    of a block's MLP, token by token, and its outputs are averaged. All linears of that MLP use the result. As published
    the average is over the whole sequence in the modules whose names begin with one of ``whole``, an encoder's; a
    decoder's is over the tokens so far, equal to it at the last one, so that a cached pass gives what an uncached one
    gives.

    One network for each block, or ``shared`` by all (E-WEMoE, arXiv 2410.21804). With ``terms`` k it weighs each of an
    expert's k rank-one terms by itself (rank-one WEMoE).

    The MLP of a block is entered through the first of its modules, in the model's order.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleLayout],
        depth: int = 2,
        shared: bool = False,
        terms: int = 1,
        whole: Sequence[str] = (),
    ):
        super().__init__()
        self.depth, self.sees_whole = depth, tuple(whole)
        linears = {name: module for name, module in modules.items() if module.kind == LINEAR}
        self.blocks = {name: block(name) for name in linears}
        first: dict[str, str] = {}
        for name, place in self.blocks.items():
            first.setdefault(place, name)
        self.entries = tuple(first.values())
        self.width = terms * len(next(iter(linears.values())).ranks)
        if depth:
            self.sites = dict.fromkeys(self.entries, self.width)
        self.network = {place: SHARED if shared else str(n) for n, place in enumerate(first)}
        sizes = {self.network[place]: linears[name].in_features for place, name in first.items()}
        self.networks = nn.ModuleDict({key: _network(size, self.width, depth) for key, size in sizes.items()})
        self.place: str | None = None
        self.now: Tensor | None = None  # the weights of the block that runs

    @property
    def shared(self) -> bool:
        """See Router."""
        return False

    def start(self) -> None:
        """See Router."""
        super().start()
        self.place = self.now = None

    def watches(self, depth: int) -> bool:
        """See Router."""
        return False

    def forward(self, name: str, x: Tensor, z: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
        """See Router; weights [..., E * k], an expert's together."""
        place = self.blocks[name]
        if name in self.entries:
            self.place, self.now = place, self._weights(name, place, x)
        if place != self.place:
            raise RuntimeError(f"{name} runs before {self.place}, the entry of its MLP: this model cannot be a WEMoE")
        return self.now

    def _weights(self, name: str, place: str, x: Tensor) -> Tensor:
        network = self.networks[self.network[place]]
        if self.depth == 0:
            return network(x).expand(*x.shape[:-1], self.width)
        values = network(x.float())
        return self.whole(name, values) if name.startswith(self.sees_whole) else self.mean(name, values)


class _Constant(nn.Module):
    """Weights that do not depend on the input."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.float()


def _network(size: int, width: int, depth: int) -> nn.Module:
    if depth == 0:
        return _Constant(width)
    hidden = [nn.Linear(size, size), nn.ReLU()] if depth == 2 else []
    return nn.Sequential(*hidden, nn.Linear(size, width)).float().requires_grad_(False)

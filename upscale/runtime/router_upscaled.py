"""What all routers share: a router decides which experts a token meets.

Symbols: ``B`` sequences, ``T`` tokens, ``E`` experts, ``C`` the router's classes (the experts and perhaps the base),
``R`` the sum of the ranks, ``d`` hidden size.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Mean = Callable[[str, Tensor], Tensor]  # (site, values [..., T, C]) -> their running means over each sequence's prefix


def sparse(p: Tensor, top_k: int | None) -> Tensor:
    """Keep the ``top_k`` largest of ``p`` [..., C] and divide by their sum; None keeps all."""
    if top_k is None or top_k >= p.shape[-1]:
        return p
    top, index = p.topk(top_k, dim=-1)
    return p.new_zeros(p.shape).scatter(-1, index, top / top.sum(dim=-1, keepdim=True))


class Router(nn.Module):
    """What all routers share: how a pass goes by.

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

    def forward(self, name: str, x: Tensor, z: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
        """Weights [..., E] of a linear, or None for no expert.

        Args:
            name: the linear's.
            x: [..., i] its input.
            z: [..., R] its projections; None if its task vectors are not low-rank.
            ranks: of each expert in ``z``.
        """
        raise NotImplementedError


def in_block(module: str) -> bool:
    """Whether a module lies in a numbered list of modules, a decoder block."""
    return any(part.isdigit() for part in module.split("."))


def block(name: str) -> str:
    """The block that a module lies in: its name up to the last number."""
    parts = name.split(".")
    last = max(n for n, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])

"""The mixture layer inside vLLM: the experts of one (fused or sharded) linear, added by its quant method."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from upscale.runtime.dense_upscaled import unpack, weighted
from upscale.runtime.layout_upscaled import DENSE, LOW_RANK, ModuleLayout
from upscale.runtime.mixture_upscaled import mixture
from upscale.runtime.routing_upscaled import Routing


@dataclass(frozen=True)
class Part:
    """One upscaled linear of the checkpoint inside a vLLM linear, which may fuse several.

    Attributes:
        name: its module name in the checkpoint.
        layout: its features and ranks.
        index: its place in the fused linear; None if it is the whole of it.
    """

    name: str
    layout: ModuleLayout
    index: int | None


class Mixture(nn.Module):
    """The experts of one vLLM linear on this rank.

    Column-parallel linears hold their rows of what makes outputs; row-parallel ones their columns of what reads inputs.

    Attributes:
        rows: for each part, the rows of the checkpoint's linear that are on this rank, in order.
        column: the columns that are on this rank.
    """

    def __init__(self, linear: Any, parts: Sequence[Part], routing: Routing):
        super().__init__()
        self.parts, self.routing = list(parts), routing
        # A head is asked for some tokens only, outside the pass that decided on them.
        self.carries = isinstance(linear, VocabParallelEmbedding) and routing.router.shared
        self.by_row = isinstance(linear, RowParallelLinear) and linear.tp_size > 1
        self.first_rank = getattr(linear, "tp_rank", 0) == 0
        columns = linear.input_size_per_partition if isinstance(linear, RowParallelLinear) else None
        self.width = columns or parts[0].layout.in_features
        self.column = (
            slice(None) if columns is None else slice(linear.tp_rank * columns, (linear.tp_rank + 1) * columns)
        )
        self.rows = [_rows(linear, part) for part in parts]
        self.heights = [sum(s.stop - s.start for s in rows) + _padding(linear, rows) for rows in self.rows]
        self.bias = nn.ParameterDict()
        for number, (part, height) in enumerate(zip(parts, self.heights, strict=True)):
            if part.layout.bias:
                bias = torch.zeros(len(part.layout.ranks), height)
                self.bias[str(number)] = nn.Parameter(bias, requires_grad=False)
        self.spans = _spans(linear, parts, self.heights)

    def loaders(self) -> dict[str, Callable[[Tensor], str]]:
        """For each tensor of the checkpoint, a function that copies this rank's share and names the parameter."""
        return {
            f"{part.name}.experts.bias": lambda t, n=number: self._load_bias(t, n)
            for number, part in enumerate(self.parts)
            if part.layout.bias
        }

    def _load_bias(self, tensor: Tensor, number: int) -> str:
        share = torch.cat([tensor[:, rows] for rows in self.rows[number]], dim=1)
        # A row-parallel linear adds its bias on one rank only, before the sum over ranks.
        self.bias[str(number)].data[:, : share.shape[1]].copy_(
            share if self.first_rank or not self.by_row else 0 * share
        )
        return f"bias.{number}"

    def received(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input [T, i] of the base's linear, and weights [T, E] if they came with it; see ``carry``."""
        width = self.parts[0].layout.in_features
        return (x[..., :width], x[..., width:]) if self.carries else (x, None)

    def forward(self, x: Tensor, y: Tensor, given: Tensor | None = None) -> Tensor:
        """Add the experts' part for ``x`` [T, i] to the base's output ``y`` [T, o]; weights [T, E] may be ``given``."""
        pieces = self.pieces(x, y, given)
        added = [pieces[n] if n is not None else y.new_zeros(*y.shape[:-1], size) for n, size in self.spans]
        return y + (added[0] if len(added) == 1 else torch.cat(added, dim=-1))

    def pieces(self, x: Tensor, y: Tensor, given: Tensor | None) -> list[Tensor]:
        """What the experts of each part add: [T, its rows]."""
        raise NotImplementedError


class LowRankMixture(Mixture):
    """Factors of all parts: their ``down`` in one, so that the input is projected once.

    A row-parallel linear holds its columns of ``down`` and ``up`` whole, and sums the projections over ranks before
    routing (a norm is not linear).
    """

    def __init__(self, linear: Any, parts: Sequence[Part], routing: Routing):
        super().__init__(linear, parts, routing)
        self.sizes = [sum(part.layout.ranks) for part in parts]
        self.down = nn.Parameter(torch.empty(sum(self.sizes), self.width), requires_grad=False)
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(height, size), requires_grad=False)
            for height, size in zip(self.heights, self.sizes, strict=True)
        )

    def loaders(self) -> dict[str, Callable[[Tensor], str]]:
        """See Mixture."""
        loaders = super().loaders()
        for number, part in enumerate(self.parts):
            owner = part.layout.tied or part.name
            loaders[f"{owner}.experts.down"] = lambda t, n=number: self._load_down(t, n)
            loaders[f"{owner}.experts.up"] = lambda t, n=number: self._load_up(t, n)
        return loaders

    def _load_down(self, tensor: Tensor, number: int) -> str:
        start = sum(self.sizes[:number])
        self.down.data[start : start + self.sizes[number]].copy_(tensor[:, self.column])
        return "down"

    def _load_up(self, tensor: Tensor, number: int) -> str:
        share = torch.cat([tensor[rows] for rows in self.rows[number]])
        self.up[number].data[: len(share)].copy_(share)
        return f"up.{number}"

    def pieces(self, x: Tensor, y: Tensor, given: Tensor | None) -> list[Tensor]:
        """See Mixture."""
        z = F.linear(x, self.down)
        seen = tensor_model_parallel_all_reduce(z.clone()) if self.by_row else z
        pieces, projections = [], z.split(self.sizes, dim=-1)
        for number, whole in enumerate(seen.split(self.sizes, dim=-1)):
            part = self.parts[number]
            ranks = part.layout.ranks
            w = self.routing.weights(part.name, whole, x, whole, ranks) if given is None else given
            bias = self.bias[str(number)] if part.layout.bias else None
            pieces.append(mixture(projections[number], w, ranks, self.up[number], bias))
        return pieces


class DenseMixture(Mixture):
    """Whole deltas ``delta`` [E, rows, columns] of each part, unpacked if the checkpoint has them sparse."""

    def __init__(self, linear: Any, parts: Sequence[Part], routing: Routing):
        super().__init__(linear, parts, routing)
        experts = len(parts[0].layout.ranks)
        self.delta = nn.ParameterList(
            nn.Parameter(torch.zeros(experts, height, self.width), requires_grad=False) for height in self.heights
        )
        self._packed: dict[int, dict[str, Tensor]] = {}

    def loaders(self) -> dict[str, Callable[[Tensor], str]]:
        """See Mixture."""
        loaders = super().loaders()
        for number, part in enumerate(self.parts):
            if part.layout.vectors == DENSE:
                loaders[f"{part.name}.experts.delta"] = lambda t, n=number: self._load(t, n)
                continue
            for name in ("values", "gaps"):
                loaders[f"{part.name}.experts.{name}"] = lambda t, n=number, name=name: self._gather(name, t, n)
        return loaders

    def _gather(self, name: str, tensor: Tensor, number: int) -> str:
        """Keep one of the two tensors of a sparse delta until the other one comes."""
        packed = self._packed.setdefault(number, {})
        packed[name] = tensor
        if len(packed) == 2:
            layout = self.parts[number].layout
            self._load(unpack(packed["values"], packed["gaps"], (layout.out_features, layout.in_features)), number)
            del self._packed[number]
        return f"delta.{number}"

    def _load(self, tensor: Tensor, number: int) -> str:
        share = torch.cat([tensor[:, rows, self.column] for rows in self.rows[number]], dim=1)
        self.delta[number].data[:, : share.shape[1]].copy_(share)
        return f"delta.{number}"

    def pieces(self, x: Tensor, y: Tensor, given: Tensor | None) -> list[Tensor]:
        """See Mixture."""
        pieces = []
        for number, part in enumerate(self.parts):
            w = self.routing.weights(part.name, y, x, None, part.layout.ranks) if given is None else given
            bias = self.bias[str(number)] if part.layout.bias else None
            pieces.append(weighted(x, w, self.delta[number], bias))
        return pieces


def may_be_reordered(linear: Any) -> bool:
    """Whether ``linear`` is fused in the checkpoint as in vLLM, so that the model's loader may move its rows."""
    return (
        linear.mixture.parts[0].index is None
        and isinstance(linear, QKVParallelLinear | MergedColumnParallelLinear)
        and isinstance(linear.quant_method, UnquantizedLinearMethod)
    )


def rows_as_loaded(load: Callable, linear: Any, name: str, shape: Sequence[int]) -> Tensor:
    """The checkpoint's rows of a linear in the order in which the model's own loader leaves them on this rank.

    Some models keep queries, keys and values head by head on disk, and their loaders sort them (BLOOM, Falcon). A
    tensor that holds the numbers of its rows, loaded in the weight's place, tells the order.

    Args:
        load: the model's ``load_weights``.
        linear: unquantised, all of its columns on this rank.
        name: of its weight in the checkpoint.
        shape: of that tensor, [o, i] or transposed.

    Returns:
        [o'] numbers of rows.
    """
    width = linear.input_size
    height = shape[0] * shape[1] // width
    digits = torch.tensor([65536, 256, 1])  # of the numbers, each exact in 16-bit floats
    weight = torch.zeros(height, width)
    weight[:, :3] = torch.arange(height).unsqueeze(1) // digits % 256
    load([(name, weight if tuple(shape) == (height, width) else weight.T)])
    return (linear.weight[:, :3].cpu().long() * digits).sum(dim=1)


def _rows(linear: Any, part: Part) -> list[slice]:
    """The rows of ``up`` that this rank holds for a part."""
    whole = slice(0, part.layout.out_features)
    if isinstance(linear, VocabParallelEmbedding):
        return [slice(linear.shard_indices.org_vocab_start_index, linear.shard_indices.org_vocab_end_index)]
    if isinstance(linear, RowParallelLinear) or linear.tp_size == 1:
        return [whole]
    sizes = linear.output_partition_sizes
    if part.index is not None:
        rank = _rank(linear, part.index)
        return [slice(rank * sizes[part.index], (rank + 1) * sizes[part.index])]
    rows, start = [], 0  # fused in the checkpoint too: a share of each of its parts
    for index, size in enumerate(sizes):
        rank = _rank(linear, index)
        rows.append(slice(start + rank * size, start + (rank + 1) * size))
        start += size * linear.tp_size // _replicas(linear, index)
    return rows


def _replicas(linear: Any, index: int) -> int:
    """How many ranks share the same key and value heads."""
    return linear.num_kv_head_replicas if isinstance(linear, QKVParallelLinear) and index > 0 else 1


def _rank(linear: Any, index: int) -> int:
    return linear.tp_rank // _replicas(linear, index)


def _padding(linear: Any, rows: list[slice]) -> int:
    """Rows that vLLM adds to a vocabulary; the experts add nothing there."""
    if not isinstance(linear, VocabParallelEmbedding):
        return 0
    return linear.num_embeddings_per_partition - sum(s.stop - s.start for s in rows)


def _spans(linear: Any, parts: Sequence[Part], heights: Sequence[int]) -> list[tuple[int | None, int]]:
    """The output's columns in order: (number of the part, columns), None for a fused linear that is not upscaled."""
    if parts[0].index is None:
        return [(0, heights[0])]
    numbers = {part.index: number for number, part in enumerate(parts)}
    return [(numbers.get(index), size) for index, size in enumerate(linear.output_partition_sizes)]


@cache
def _with_experts(method: type) -> type:
    """A quant method's class whose product, quantised or not, gains the experts' part."""

    class Upscaled(method):
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            x, given = layer.mixture.received(x)
            return layer.mixture(x, super().apply(layer, x, bias), given)

    Upscaled.__name__ = Upscaled.__qualname__ = f"Upscaled{method.__name__}"
    return Upscaled


def carry(hidden: Tensor, routing: Routing) -> Tensor:
    """Hidden states [T, d] with their weights [T, E] behind them, on their way to the output head."""
    return torch.cat([hidden, routing.weights("", hidden).to(hidden.dtype)], dim=-1)


def attach(linear: Any, parts: Sequence[Part], routing: Routing) -> Mixture:
    """Give a vLLM linear or output head its experts. The module, its name and its weights stay as they are.

    Raises:
        TypeError: it is no linear of vLLM's.
    """
    if not issubclass(type(linear), LinearBase | VocabParallelEmbedding):
        raise TypeError(
            f"{parts[0].name} is a {type(linear).__name__} in vLLM, not a linear; it cannot be upscaled there"
        )
    kind = LowRankMixture if parts[0].layout.vectors == LOW_RANK else DenseMixture
    linear.mixture = kind(linear, parts, routing)
    method = copy(linear.quant_method)
    # A subclass, not a wrapper: vLLM asks for class attributes and isinstance of its quant methods.
    method.__class__ = _with_experts(type(method))
    linear.quant_method = method
    linear.requires_unquantized_input = True  # the experts need the activation before it is quantised
    return linear.mixture

"""The experts' own heads of an upscaled classifier: one is chosen by the caller, or by where the router sends an input.

Symbols: ``B`` inputs, ``T`` tokens, ``E`` experts.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .routing_upscaled import BASE, Routing


class Heads(nn.Module):
    """Every expert's tensors of the head, as parameters ``<number of the expert>.<name of the tensor>``.

    Args:
        model: the classifier; what its head's modules return is replaced by what they return with an expert's tensors.
        routing: of the model.
        shapes: of the tensors, by expert and name.
        dtype: of the parameters.
        device: of the parameters.
    """

    routing: Routing

    def __init__(
        self,
        model: Any,
        routing: Routing,
        shapes: Mapping[str, Mapping[str, Sequence[int]]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.experts, self.routing = list(shapes), routing
        self.chosen: str | Sequence[str] | None = None  # by the caller
        for number, tensors in enumerate(shapes.values()):
            for name, shape in tensors.items():
                _put(self, f"{number}.{name}", nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device)))
        model.register_forward_pre_hook(lambda *_: routing.count_votes())
        for module in dict.fromkeys(name.partition(".")[0] for tensors in shapes.values() for name in tensors):
            model.get_submodule(module).register_forward_hook(partial(self._replace, module), with_kwargs=True)

    @contextmanager
    def use(self, expert: str | Sequence[str] | None):
        """Within the context, use the head of ``expert``: a name, "base", or a name for each input of the batch."""
        self.routing.one_hot(expert)  # refuses unknown names
        before, self.chosen = self.chosen, expert
        try:
            yield
        finally:
            self.chosen = before

    def names(self, size: int) -> list[str]:
        """The head for each of ``size`` inputs: chosen by the caller, of the expert forced, or where most routing went.

        An input that no expert has most of gets the base's head.
        """
        if self.chosen is not None:
            return [self.chosen] * size if isinstance(self.chosen, str) else list(self.chosen)
        votes = self.routing.votes
        if votes is None:
            return [BASE] * size
        top, number = votes.expand(size, -1).max(dim=-1)
        equal = votes.eq(top.unsqueeze(-1)).sum(dim=-1)
        return [self.experts[n] if e == 1 else BASE for n, e in zip(number.tolist(), equal.tolist(), strict=True)]

    def _replace(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        names = self.names(len(output))
        results = {name: self._run(name, path, module, args, kwargs, output) for name in dict.fromkeys(names)}
        if len(results) == 1:
            return results[names[0]]
        if len({result.shape for result in results.values()}) > 1:
            sizes = ", ".join(f"{name} ({result.shape[-1]})" for name, result in results.items())
            raise ValueError(
                f"the inputs of this batch are for heads of different sizes: {sizes}; "
                "give them one by one, or choose a head: `with model.heads.use(expert)`"
            )
        return torch.stack([results[name][row] for row, name in enumerate(names)])

    def _run(self, name: str, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if name == BASE:
            return output
        number = self.experts.index(name)
        own = {n: p for n, p in self.named_parameters() if n.startswith(f"{number}.{path}.")}
        tensors = {n.removeprefix(f"{number}.{path}."): parameter for n, parameter in own.items()}
        forward = _Forward(module)
        return torch.func.functional_call(forward, {f"module.{n}": t for n, t in tensors.items()}, args, kwargs)


class _Forward(nn.Module):
    """Runs a module without its hooks, of which one calls this."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module.forward(*args, **kwargs)


def _put(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.register_parameter(leaf, parameter)

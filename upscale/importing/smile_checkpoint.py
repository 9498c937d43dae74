"""A FusionBench SMILE checkpoint of a language model as it lies on disk: names and shapes checked, read by linear.

For a linear P, FusionBench 0.2.33 (``fusion_bench/models/smile_moe/linear_from_hf_config.py``) stores the base's as
``P.shared_linear``, ``P.gate.weight`` [T * g, i] with g right singular vectors of each of T experts, and of each expert
``u`` [o, k] and ``svh`` [k, i], or a dense ``weight``, and ``bias``. A linear that no expert changed is a plain ``P``.
"""

import re
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from upscale.building.linalg import factor
from upscale.building.skeleton import on_meta
from upscale.errors import ConversionError, NonFiniteError
from upscale.importing.factors import factors, orthonormal
from upscale.runtime.layout_upscaled import ModuleLayout
from zoo import Checkpoint
from zoo.preflight import parameters

_TYPES = ("smile_llama", "smile_mistral", "smile_qwen2")
_NUMBERS = ("num_local_experts", "num_experts_per_tok", "rank_of_router", "rank_of_expert")
_GATE = ".gate.weight"


class SmileCheckpoint:
    """A FusionBench SMILE checkpoint of a language model, its headers checked: nothing missing, nothing unknown.

    Args:
        checkpoint: as it lies on disk.

    Raises:
        ConversionError: another kind of model, or not the tensors that its ``config.json`` promises.
        PlanError: transformers makes no model of the base's configuration.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, _base_config(checkpoint)
        experts, top_k, router_rank, rank = (_number(checkpoint, name) for name in _NUMBERS)
        self.experts, self.top_k, self.router_rank, self.rank = experts, top_k, router_rank, rank
        if min(experts, router_rank, top_k) < 1 or top_k > experts:
            raise ConversionError(
                f"{checkpoint.path}: config.json has num_local_experts {experts}, num_experts_per_tok {top_k} and "
                f"rank_of_router {router_rank}: no such router"
            )
        self.shapes = {name: tuple(p.shape) for name, p in on_meta(self.config).named_parameters()}
        linears = [name.removesuffix(".weight") for name, shape in self.shapes.items() if len(shape) == 2]
        self.modules = [name for name in linears if f"{name}{_GATE}" in checkpoint.tensors]
        self.plain = [name for name in linears if name not in self.modules and name.endswith("_proj")]
        self._check()

    def stored(self, name: str) -> str:
        """The checkpoint's name for a tensor of the base."""
        module, _, leaf = name.rpartition(".")
        return f"{module}.shared_linear.{leaf}" if module in self.modules else name

    def has_bias(self, module: str) -> bool:
        """Whether a linear, and thus each of its experts, has a bias."""
        return f"{module}.bias" in self.shapes

    @cached_property
    def biases(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """By linear that has them: the base's bias [o] and the experts' [T, o], float32."""
        return {
            module: (
                self.read(self.stored(f"{module}.bias")).float(),
                torch.stack([self.read(f"{module}.experts.{e}.bias").float() for e in range(self.experts)]),
            )
            for module in self.modules
            if self.has_bias(module)
        }

    @property
    def whole_biases(self) -> bool:
        """Whether the experts' biases are nearer to the base's than to zero: whole ones, and no differences.

        FusionBench 0.2.33 stores low-rank experts with their whole biases, and adds the base's to them when it runs.
        """
        return sum(float((own - base).square().sum() - own.square().sum()) for base, own in self.biases.values()) < 0

    def read(self, name: str) -> Tensor:
        """A tensor by the checkpoint's own name. Raises NonFiniteError if it is not finite."""
        tensor = self.checkpoint.read(name)
        if not tensor.isfinite().all():
            raise NonFiniteError(f"tensor {name} has NaN or infinite values; is the download complete?")
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The format of a tensor of the base."""
        return self.checkpoint.tensors[self.stored(name)].dtype

    def experts_of(self, module: str, *, whole_biases: bool) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """Ranks of a linear's experts and their tensors in our format, float32: down, up and, if any is not 0, bias.

        Args:
            module: the linear.
            whole_biases: of the experts: subtract the base's.

        Raises:
            ConversionError: the gate is none that our router can be.
        """
        gates = self.read(f"{module}{_GATE}").split(self.router_rank)
        downs, ups = [], []
        for e, gate in enumerate(gates):
            if len(gates) == 1:  # nothing to choose: FusionBench asks no gate, nor do we
                gate = gate[:0]
            elif not orthonormal(gate):
                raise ConversionError(
                    f"tensor {module}{_GATE}: the rows of expert {e} are not orthonormal; a gate that was trained "
                    "further is no projection router: build the model from its sources with `upscale smile`"
                )
            expert = f"{module}.experts.{e}"
            if self.rank > 0:
                left, right = self.read(f"{expert}.u"), self.read(f"{expert}.svh")
            else:
                delta = self.read(f"{expert}.weight")
                exact = factor(delta, min(delta.shape), exact=True)
                left, right = exact.up, exact.down
            down, up = factors(left, right, gate)
            downs.append(down)
            ups.append(up)
        tensors = {"down": torch.cat(downs), "up": torch.cat(ups, dim=1)}
        if self.has_bias(module):
            base, own = self.biases[module]
            bias = own - base if whole_biases else own
            tensors |= {"bias": bias} if bias.any() else {}
        return tuple(len(down) for down in downs), tensors

    def largest(self, module: str) -> ModuleLayout:
        """The largest layout that a linear can get."""
        o, i = self.shapes[f"{module}.weight"]
        gate = self.router_rank if self.experts > 1 else 0
        own = min(self.rank if self.rank > 0 else min(o, i), i - gate)
        return ModuleLayout(i, o, (gate + own,) * self.experts, self.has_bias(module))

    def _check(self) -> None:
        untied = {name: info for name, info in self.checkpoint.tensors.items() if name in self.shapes}
        tensors = {**parameters(self.checkpoint), **untied}  # a head that is not tied counts, even where it is a copy
        wanted = {self.stored(name): shape for name, shape in self.shapes.items()}
        for module in self.modules:
            o, i = self.shapes[f"{module}.weight"]
            low_rank = {"u": (o, self.rank), "svh": (self.rank, i)}
            of_expert = low_rank if self.rank > 0 else {"weight": (o, i)}
            of_expert |= {"bias": (o,)} if self.has_bias(module) else {}
            for e in range(self.experts):
                wanted |= {f"{module}.experts.{e}.{name}": shape for name, shape in of_expert.items()}
            gate, rows = f"{module}{_GATE}", self.experts * self.router_rank
            wanted[gate] = (rows, i)
            if (found := tensors[gate].shape) != (rows, i):
                raise ConversionError(
                    f"tensor {gate} has shape {list(found)}, not [{rows}, {i}]: num_local_experts {self.experts} times "
                    f"rank_of_router {self.router_rank} rows"
                )
        path = self.checkpoint.path
        for what, names in (("lacks", wanted.keys() - tensors.keys()), ("has", tensors.keys() - wanted.keys())):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                why = "which its config.json promises" if what == "lacks" else "which no SMILE model of its kind has"
                raise ConversionError(f"{path}: {what} tensor {min(names)}{more}, {why}")
        for name, shape in wanted.items():
            if (info := tensors[name]).shape != shape:
                raise ConversionError(f"tensor {name} has shape {list(info.shape)}, not {list(shape)}")
            if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                raise ConversionError(f"tensor {name} is {info.dtype}, not a float of 16 bits or more")


def _base_config(checkpoint: Checkpoint) -> dict:
    """The base's ``config.json``."""
    kind = checkpoint.config.get("model_type")
    if kind not in _TYPES:
        reason = (
            "FusionBench itself cannot build it" if kind == "smile_gemma2" else "not a SMILE model of FusionBench's"
        )
        raise ConversionError(f"{checkpoint.path}: model type {kind}: {reason}; {', '.join(_TYPES)} can be imported")
    config = {key: value for key, value in checkpoint.config.items() if key not in (*_NUMBERS, "auto_map")}
    architectures = [re.sub("^Smile", "", name) for name in config.get("architectures") or []]
    return config | {"model_type": kind.removeprefix("smile_"), "architectures": architectures}


def _number(checkpoint: Checkpoint, field: str) -> int:
    value = checkpoint.config.get(field)
    if type(value) is not int:
        raise ConversionError(f"{checkpoint.path}: config.json has no number {field}, but {value!r}")
    return value

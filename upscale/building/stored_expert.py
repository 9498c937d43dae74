"""An expert of an upscaled checkpoint: as a model, and as the very factors that are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from upscale.building.changes import NormChange
from upscale.building.linalg import LowRank
from upscale.building.skeleton import Linear, Norm
from upscale.building.stored import Stored
from upscale.errors import LoadError
from upscale.runtime.dense_upscaled import unpack
from upscale.runtime.layout_upscaled import DENSE, SPARSE, ModuleLayout
from zoo import TensorSpec
from zoo.reading.model import Extent, TensorInfo
from zoo.reading.product import Product


@dataclass(frozen=True)
class StoredExpert:
    """An expert of an upscaled checkpoint, as a model whose tensors are the base's and what is stored of its deltas.

    A build takes its factors as they are, see ``Changes``.
    """

    stored: Stored
    name: str

    @classmethod
    def of(cls, stored: Stored, name: str) -> "StoredExpert":
        """The expert of this name. Raises LoadError if there is none."""
        if name not in stored.layout.experts:
            raise LoadError(f"{stored.path}: no expert {name} in this model; it has {', '.join(stored.layout.experts)}")
        return cls(stored, name)

    @property
    def number(self) -> int:
        """Its place among the experts."""
        return self.stored.layout.experts.index(self.name)

    # ------------------------------------------------------------------------------------------------------- a model
    @property
    def path(self) -> Path:
        """See Model."""
        return self.stored.path

    @property
    def config(self) -> Mapping:
        """See Model: the base's, with the names of its own classes, and without ties that its head has not."""
        labels = self.stored.layout.labels.get(self.name)
        own: dict = {}
        if labels:
            own = {"id2label": dict(labels), "label2id": {label: int(number) for number, label in labels.items()}}
        return {**self.stored.base.config, **own, **({"tie_word_embeddings": False} if self._own_head else {})}

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See Model."""
        base = self.stored.base.tensors
        own = {name: TensorSpec(tuple(shape), base[name].dtype) for name, shape in self.heads.items()}
        if (head := self.stored.split_head) is not None:
            own[self._own_head] = base[head.weight]
        return {**base, **own}

    @property
    def heads(self) -> Mapping[str, tuple[int, ...]]:
        """Of a classifier, the shapes of the tensors of its own head."""
        return self.stored.layout.heads.get(self.name, {})

    @property
    def _own_head(self) -> str:
        """The tensor of a head that the base's has no tensor for; empty if there is none."""
        return f"{head.name}.weight" if (head := self.stored.split_head) is not None else ""

    @property
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """See Model."""
        return self.stored.checkpoint.tensors

    @property
    def nbytes(self) -> int:
        """See Model: the size of its source, or what it takes here where that is not known."""
        report = self.stored.report
        if report is not None and self.name in report.expert_bytes:
            return report.expert_bytes[self.name]
        return self.stored_bytes

    @property
    def companions(self) -> Mapping[str, Path | bytes]:
        """See Model."""
        return self.stored.base.companions

    def extent(self, name: str) -> Extent | None:
        """See Model."""
        if name in self.heads:
            return self.stored.checkpoint.extent(f"heads.{self.number}.{name}")
        return None if name == self._own_head or name in self.stored.places else self.stored.base.extent(name)

    def known_rank(self, name: str) -> int | None:
        """See Model: ``rank`` tells it, by module."""
        return None

    def product(self, name: str) -> Product | None:
        """See Model: its factors are taken by ``factors``, with what is known of them."""
        return None

    def read(self, name: str) -> Tensor:
        """See Model: the base's tensor with what is stored of this expert's delta, in the base's format."""
        if name in self.heads:
            return self.stored.checkpoint.read(f"heads.{self.number}.{name}")
        head = self.stored.split_head
        if name == self._own_head and head is not None:
            return self._changed(head, head.weight)
        if (module := self.stored.places.get(name)) is None:
            return self.stored.base.read(name)
        return self._changed(module, name)

    def _changed(self, module: Linear | Norm, name: str) -> Tensor:
        base = self.stored.base.read(name)
        origin = base.float()
        if isinstance(module, Norm):
            change = self.of_norm(module)
            if name == module.weight:
                changed = (module.offset + origin) * (1 + change.scale) - module.offset
            else:
                changed = origin * (1 + change.scale) + change.shift
        elif name == module.bias:
            changed = origin + self.of_bias(module)
        else:
            delta = self.delta(module)
            changed = origin + (delta.mT if module.transposed else delta)
        return changed.to(base.dtype).contiguous()

    # ------------------------------------------------------------------------------------------- what is stored of it
    def layout(self, module: str) -> ModuleLayout | None:
        """What is stored for a module, under the embedding's name for a tied head; None if nothing."""
        return self.stored.layout.modules.get(self._holder(module))

    def _holder(self, module: str) -> str:
        entry = self.stored.layout.modules.get(module)
        return entry.tied if entry is not None and entry.tied else module

    def rank(self, linear: Linear) -> int:
        """See Changes."""
        return layout.ranks[self.number] if (layout := self.layout(linear.name)) is not None else 0

    @property
    def stored_bytes(self) -> int:
        """Size of its part of the experts' tensors."""
        total = 0
        for name, module in self.stored.layout.modules.items():
            for tensor in module.shapes():
                info = self.stored.checkpoint.tensors[f"{name}.experts.{tensor}"]
                whole, part = len(module.ranks), 1
                if tensor in ("down", "up"):
                    whole, part = max(1, sum(module.ranks)), module.ranks[self.number]
                total += info.nbytes * part // whole
        for name in self.heads:
            total += self.stored.checkpoint.tensors[f"heads.{self.number}.{name}"].nbytes
        return total

    def factors(self, linear: Linear) -> LowRank:
        """Its factors for a linear, float32, with the norms that were measured when it was built."""
        norm, left = self.measured(self._holder(linear.name))
        layout = self.layout(linear.name)
        if layout is None:
            down, up = torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0)
            return LowRank(down, up, norm, left)
        start = sum(layout.ranks[: self.number])
        own = slice(start, start + layout.ranks[self.number])
        holder = self._holder(linear.name)
        down, up = self.stored.read(holder, "down")[own], self.stored.read(holder, "up")[:, own]
        up = pad(up.float(), (0, 0, 0, linear.out_features - len(up)))  # of tokens that the vocabulary gained since
        return LowRank(down.float(), up.contiguous(), norm, left)

    def delta(self, linear: Linear) -> Tensor:
        """What is stored of its delta of a linear, [o, i] float32."""
        layout = self.layout(linear.name)
        holder = self._holder(linear.name)
        if layout is not None and layout.vectors == DENSE:
            return self.stored.read(holder, "delta")[self.number].float()
        if layout is not None and layout.vectors == SPARSE:
            values, gaps = (self.stored.read(holder, t)[self.number, None] for t in ("values", "gaps"))
            return unpack(values, gaps, (layout.out_features, layout.in_features))[0].float()
        found = self.factors(linear)
        return found.up @ found.down

    def of_linear(self, linear: Linear, origin: Callable[[], Tensor], *, merged: bool) -> LowRank:
        """See Changes: the factors that are stored, whatever was written for the base."""
        return self.factors(linear)

    def of_bias(self, linear: Linear) -> Tensor:
        """See Changes."""
        layout = self.layout(linear.name)
        if layout is None or not layout.bias:
            return torch.zeros(linear.out_features)
        return self.stored.read(self._holder(linear.name), "bias")[self.number].float()

    def of_norm(self, norm: Norm) -> NormChange:
        """See Changes."""
        none, layout = torch.zeros(norm.width), self.layout(norm.name)
        stored = layout.shapes() if layout is not None else ()
        rows = {name: self.stored.read(norm.name, name)[self.number].float() for name in stored}
        norms = self.measured(norm.weight), self.measured(norm.bias or "")
        return NormChange(rows.get("scale", none), rows.get("shift", none), *norms)

    def of_rest(self, name: str, origin: Callable[[], Tensor]) -> float:
        """See Changes: as it was measured when the model was built."""
        return self.measured(name)[0]

    def measured(self, name: str) -> tuple[float, float]:
        """Norms of its delta of a linear, or of a tensor that is no linear's, and of what is missing of it."""
        found = self.stored.measured.get(name)
        return (found.norms.get(self.name, 0.0), found.left.get(self.name, 0.0)) if found else (0.0, 0.0)

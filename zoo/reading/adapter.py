"""A LoRA adapter of PEFT, seen as the model that it makes of its base. Nothing is merged to know it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import CheckpointError
from zoo.reading.companions import companions
from zoo.reading.folder import Folder
from zoo.reading.model import Extent, Model, TensorInfo, TensorSpec
from zoo.reading.plain_lora import CONFIG, require_plain
from zoo.reading.product import Product
from zoo.reading.shards import ADAPTER, ADAPTER_PICKLE, header, read
from zoo.reading.tied import HEAD, embedding_of, has_tied_head

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.weight)?$")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias$")


@dataclass(frozen=True)
class Factors:
    """Where the two factors of a matrix's difference are: ``scale * B A``, turned like the base's tensor.

    Attributes:
        a: tensor [r, i] in the adapter's file; of an embedding [r, V].
        b: tensor [o, r]; of an embedding [d, r].
        scale: alpha / r, or alpha / sqrt(r).
        transposed: the base's tensor is [i, o].
    """

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """A base with a LoRA on it: the interface of a checkpoint, of which only what the LoRA changed is stored.

    Attributes:
        path: the adapter's directory.
        settings: ``adapter_config.json``.
        base: the model that it is on.
        tensors: those of the model that it makes of its base.
        stored: those of its own file.
        factors: by tensor of the model, what is added to it.
        whole: by tensor of the model, the stored tensor that takes its place (``modules_to_save``, biases).
        shifts: by bias of the model, the stored tensor that is added to it, and its scale.
    """

    path: Path
    settings: Mapping
    base: Model
    tensors: Mapping[str, TensorSpec]
    stored: Mapping[str, TensorInfo]
    factors: Mapping[str, Factors]
    whole: Mapping[str, str]
    shifts: Mapping[str, tuple[str, float]]

    @classmethod
    def open(cls, folder: Folder, base: Model, *, allow_pickle: bool = False) -> "Adapter":
        """Read the adapter's configuration and header, and find the tensors of ``base`` that it changes.

        Args:
            folder: with ``adapter_config.json`` and its weights.
            base: the model that it was trained on.
            allow_pickle: take ``adapter_model.bin`` where there is no safetensors file; only tensors are unpickled.

        Raises:
            CheckpointError: no LoRA, one of a kind that is no low-rank difference, damaged, or not of this base.
        """
        settings = folder.read_json(CONFIG)
        require_plain(folder.path, settings)
        names = folder.names()
        if ADAPTER not in names and ADAPTER_PICKLE in names and not allow_pickle:
            raise CheckpointError(
                f"{folder.path}: weights only as pickle ({ADAPTER_PICKLE}), which can run code when read; pass "
                "--allow-pickle to read tensors alone, or convert it with `save_pretrained`"
            )
        if not {ADAPTER, ADAPTER_PICKLE} & set(names):
            raise CheckpointError(f"{folder.path}: an adapter without weights (no {ADAPTER}); fetch it again")
        stored = header(folder, ADAPTER if ADAPTER in names else ADAPTER_PICKLE)
        return _Parts(folder.path, settings, base, stored).adapter()

    @property
    def config(self) -> Mapping:
        """The base's, whose head is no longer tied if the adapter parts it from the embedding."""
        parted = HEAD in self.tensors and HEAD not in self.base.tensors
        return {**self.base.config, "tie_word_embeddings": False} if parted else self.base.config

    @property
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """See Model."""
        return self.stored

    @property
    def nbytes(self) -> int:
        """See Model."""
        return sum(info.nbytes for info in self.stored.values())

    @property
    def companions(self) -> Mapping[str, Path | bytes]:
        """See Model."""
        return companions(self.path)

    def read(self, name: str) -> Tensor:
        """One tensor of the model that the adapter makes of its base; float32 where something is added to it."""
        tensor = read(self.stored[self.whole[name]], self.whole[name]) if name in self.whole else self._of_base(name)
        if name in self.shifts:
            stored, scale = self.shifts[name]
            tensor = tensor.float() + scale * read(self.stored[stored], stored).float()
        return tensor.float() + self._factored(name).dense() if name in self.factors else tensor

    def extent(self, name: str) -> Extent | None:
        """See Model."""
        if name in self.factors or name in self.shifts:
            return None
        if name in self.whole:
            return self.stored[self.whole[name]].extent
        return self.base.extent(self._in_base(name))

    def known_rank(self, name: str) -> int | None:
        """See Model: that of its factors, 0 of what it leaves alone."""
        if name in self.whole or name in self.shifts:
            return None
        return self.stored[self.factors[name].a].shape[0] if name in self.factors else 0

    def product(self, name: str) -> Product | None:
        """See Model; None for what is stored whole, unless it is the base's own tensor saved once more."""
        if name in self.whole and not self._same(name):
            return None
        if name in self.factors:
            return self._factored(name)
        if len(shape := self.tensors[name].shape) == 2 and name not in self.shifts:
            return Product(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))
        return None

    def _of_base(self, name: str) -> Tensor:
        return self.base.read(self._in_base(name))

    def _in_base(self, name: str) -> str:
        """What the base calls a tensor: it has none for a tied head that the adapter parts from its embedding."""
        return name if name in self.base.tensors else embedding_of(self.base)

    def _same(self, name: str) -> bool:
        """PEFT saves embeddings beside their own LoRA, changed or not."""
        if name not in self.factors:
            return False
        saved, base = read(self.stored[self.whole[name]], self.whole[name]), self._of_base(name)
        return saved.shape == base.shape and torch.equal(saved.to(base.dtype), base)

    def _factored(self, name: str) -> Product:
        at = self.factors[name]
        a, b = (read(self.stored[tensor], tensor).float() for tensor in (at.a, at.b))
        product = Product(at.scale * b, a)
        return product.mT if at.transposed else product


class _Parts:
    """Sorts what an adapter stores by the tensors of the base that it changes."""

    def __init__(self, path: Path, settings: Mapping, base: Model, stored: Mapping[str, TensorInfo]):
        self.path, self.settings, self.base, self.stored = path, settings, base, stored
        self.tensors: dict[str, TensorSpec] = dict(base.tensors)
        self.whole: dict[str, str] = {}
        self.shifts: dict[str, tuple[str, float]] = {}
        self.sides: dict[tuple[str, bool], dict[str, str]] = {}  # (module, embedding) -> {"A": tensor, "B": tensor}

    def adapter(self) -> Adapter:
        shifted = []
        for name in self.stored:
            if match := _FACTOR.match(name):
                self.sides.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = name
            elif match := _BIAS.match(name):
                shifted.append((match["module"], name))
            elif ".lora_" in name:
                raise CheckpointError(f"{self.path}: tensor {name} is no part of a plain LoRA; merge it into its base")
            else:
                self._replace(name)
        for module, name in shifted:
            self.shifts[self._tensor(module, "bias")] = (name, self._scale(module, self._rank(module)))
        factors = self._factors()
        if not (factors or self.whole or self.shifts):
            raise CheckpointError(f"{self.path}: changes nothing of its base; is it the right adapter?")
        if has_tied_head(self.base) and embedding_of(self.base) in factors.keys() | self.whole.keys():
            # PEFT leaves a tied head with the base's weights when it changes the embedding alone.
            self.tensors.setdefault(HEAD, self.base.tensors[embedding_of(self.base)])
        return Adapter(self.path, self.settings, self.base, self.tensors, self.stored, factors, self.whole, self.shifts)

    def _replace(self, name: str) -> None:
        module, _, kind = name.rpartition(".")
        module = module.replace(".modules_to_save", "").replace(".original_module", "").replace(".base_layer", "")
        tensor = self._tensor(module, kind)
        spec = self.stored[name]
        if spec.shape[1:] != self.tensors[tensor].shape[1:]:  # rows may be of more tokens, which is judged elsewhere
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(spec.shape)}, the base's {tensor} is "
                f"{list(self.tensors[tensor].shape)}; it was not trained on this base"
            )
        self.whole[tensor] = name
        self.tensors[tensor] = replace(self.tensors[tensor], shape=spec.shape, dtype=spec.dtype)

    def _factors(self) -> dict[str, Factors]:
        turned = self._turned()
        found = {}
        for (module, embeds), sides in self.sides.items():
            if len(sides) != 2:
                raise CheckpointError(f"{self.path}: {module} has one factor of two; fetch the adapter again")
            tensor = self._tensor(module, "weight")
            (r, i), (o, rank) = (self._shape(sides[side]) for side in "AB")
            wanted = self.tensors[tensor].shape
            transposed = embeds or (turned if i == o else (o, i) != wanted)
            if r != rank or ((i, o) if transposed else (o, i)) != wanted:
                raise CheckpointError(
                    f"{self.path}: {module} has factors {[o, rank]} and {[r, i]}, the base's {tensor} is "
                    f"{list(wanted)}; it was not trained on this base"
                )
            found[tensor] = Factors(sides["A"], sides["B"], self._scale(module, r), transposed)
        return found

    def _turned(self) -> bool:
        """Whether the base's blocks store [i, o] (Conv1D): as their other matrices show, or as the adapter says."""
        for (module, embeds), sides in self.sides.items():
            if embeds or len(sides) != 2 or not re.search(r"\.\d+\.", module):
                continue
            (_, i), (o, _) = (self._shape(sides[side]) for side in "AB")
            if i != o:
                return self.tensors[self._tensor(module, "weight")].shape == (i, o)
        return bool(self.settings.get("fan_in_fan_out"))

    def _shape(self, name: str) -> tuple[int, int]:
        shape = self.stored[name].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(shape)}; only LoRA of matrices is read (not of convolutions), "
                "and shards must be gathered before it is saved"
            )
        return shape[0], shape[1]

    def _rank(self, module: str) -> int:
        return self._shape(self.sides[module, False]["A"])[0]

    def _scale(self, module: str, rank: int) -> float:
        """PEFT's scaling; ``alpha_pattern`` names modules by the end of their names, as regular expressions."""
        alpha: Any = self.settings["lora_alpha"]
        name = module.removeprefix(_PREFIX)
        for pattern, value in dict(self.settings.get("alpha_pattern") or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise CheckpointError(
                    f"{self.path / CONFIG}: alpha_pattern {pattern!r} is no pattern: {error}"
                ) from error
            if matches:
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def _tensor(self, module: str, kind: str) -> str:
        """The base's tensor of a module, whose names may have a prefix more or less than the base's file."""
        name = f"{module.removeprefix(_PREFIX)}.{kind}"
        if name in self.tensors:
            return name
        if name == HEAD:  # tied until now
            self.tensors[HEAD] = self.tensors[embedding_of(self.base)]
            return HEAD
        longer = [tensor for tensor in self.tensors if tensor.endswith(f".{name}")]
        shorter = [tensor for tensor in self.tensors if name.endswith(f".{tensor}")]
        for found in (longer, sorted(shorter, key=len)[-1:]):
            if len(found) == 1:
                return found[0]
        raise CheckpointError(f"{self.path}: changes {name}, which the base has not; it was not trained on this base")

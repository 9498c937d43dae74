"""Read a checkpoint lazily: configuration and headers first, then one tensor at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoo.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of dtypes in a safetensors header.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor as its file's header describes it."""

    file: Path = field(compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: ``config``, the headers of its tensors, and a reader for each.

    Attributes:
        path: the directory.
        config: ``config.json``.
        tensors: by name, from the headers of all shards.
    """

    path: Path
    config: Mapping
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read ``config.json`` and every shard's header; no weights.

        Raises:
            CheckpointError: not a model, weights only as pickle or as an adapter, a shard missing or truncated.
        """
        path = Path(path)
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: a LoRA adapter, not a full checkpoint; merge it into its base first")
        config = _read_json(path / "config.json", f"{path}: not a model directory (no config.json)")
        tensors: dict[str, TensorInfo] = {}
        for file, names in _shards(path).items():
            tensors |= _header(file, names)
        return cls(path, config, tensors)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, on the CPU.

        The file is opened for each tensor, so that its memory map, and with it the process's size, is freed after use.
        """
        with _opened(self.tensors[name].file) as shard:
            return shard.get_tensor(name)


def _read_json(file: Path, missing: str) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
    return content


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Each shard with the tensors that the index promises in it (None without an index)."""
    shards: dict[Path, set[str] | None]
    if (path / SINGLE).is_file():  # before the index, as in transformers
        shards = {path / SINGLE: None}
    elif (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
            raise CheckpointError(f"{path / INDEX}: no weight_map of tensors and files; fetch the file again")
        shards = {path / file: set() for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            names = shards[path / file]
            assert names is not None
            names.add(name)
    elif pickles := sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        raise CheckpointError(
            f"{path}: weights only as pickle ({pickles[0]}), which can run code when read; "
            "convert them with `save_pretrained` (it writes safetensors) and try again"
        )
    else:
        raise CheckpointError(f"{path}: no weights (neither {SINGLE} nor {INDEX})")
    if missing := [file.name for file in shards if not file.is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}; fetch the model again"
        )
    return shards


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); fetch the file again") from error
    except (RuntimeError, MemoryError) as error:  # a private map of the whole file counts as memory
        raise CheckpointError(f"{file}: too large to map ({error}); save the model in smaller shards") from error


def _header(file: Path, names: set[str] | None) -> dict[str, TensorInfo]:
    infos = {}
    with _opened(file) as shard:
        found = set(shard.keys())
        if absent := sorted((names or set()) - found):
            raise CheckpointError(f"{file}: tensor {absent[0]} is in the index but not in the shard; fetch both again")
        for name in sorted(found if names is None else names):
            view = shard.get_slice(name)
            if (kind := view.get_dtype()) not in DTYPES:
                raise CheckpointError(f"{file}: tensor {name} has dtype {kind}, which is not read")
            infos[name] = TensorInfo(tuple(view.get_shape()), DTYPES[kind], file)
    return infos

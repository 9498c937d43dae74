"""Files of tensors: safetensors, and pickles where they are allowed. Headers first, then one tensor at a time."""

import json
import mmap
import pickle
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoo.errors import CheckpointError
from zoo.reading.folder import Folder
from zoo.reading.model import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
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


def tensors_of(folder: Folder, *, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """The tensors of a model's shards, from the headers alone (a pickle's are known once it is opened).

    Args:
        folder: with ``model.safetensors``, or shards with or without their index; or the same as pickles.
        allow_pickle: take pickles where there is no safetensors file. Only tensors are unpickled, never code.

    Raises:
        CheckpointError: no weights, pickles that are not allowed, a shard missing or damaged, an index that lies.
    """
    names = set(folder.names())
    shards = _shards(folder, SINGLE, INDEX) or (_shards(folder, PICKLE, PICKLE_INDEX) if allow_pickle else {})
    if not shards:
        raise CheckpointError(_none(folder.path, sorted(names)))
    if missing := [name for name in shards if name not in names]:
        raise CheckpointError(
            f"{folder.path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}; "
            "fetch the model again"
        )
    found: dict[str, TensorInfo] = {}
    for name, promised in shards.items():
        file = folder.file(name)
        held = header(folder, name)
        if absent := sorted((promised or set()) - held.keys()):
            raise CheckpointError(f"{file}: tensor {absent[0]} is in the index but not in the shard; fetch both again")
        if again := sorted(found.keys() & held.keys() if promised is None else ()):
            raise CheckpointError(f"{file}: tensor {again[0]} is in another shard too; fetch the model again")
        found |= {key: held[key] for key in sorted(held if promised is None else promised)}
    return found


def is_complete(folder: Folder) -> bool:
    """Whether all files of a model's or an adapter's weights are here."""
    names = set(folder.names())
    shards = _shards(folder, SINGLE, INDEX)
    return ADAPTER in names or (bool(shards) and names >= shards.keys())


def weight_files(names: Collection[str], *, allow_pickle: bool) -> list[str]:
    """Of all files of a model on the Hub, those that its weights may be in: the rest are copies in other formats."""
    top = [name for name in sorted(names) if "/" not in name]
    found = [name for name in top if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if found or not allow_pickle:
        return found
    return [name for name in top if name.endswith(".bin") and name.startswith(("pytorch_model", "adapter_model"))]


def _shards(folder: Folder, single: str, index: str) -> Mapping[str, set[str] | None]:
    """The files of a model's weights, with the tensors that an index promises in each; empty if there are none."""
    names = folder.names()
    if single in names:  # before the index, as in transformers
        return {single: None}
    if index in names:
        return _indexed(folder, index)
    stem, _, ending = single.partition(".")
    pattern = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{ending}")
    count = max((int(match[1]) for name in names if (match := pattern.fullmatch(name))), default=0)
    return {f"{stem}-{n:05d}-of-{count:05d}.{ending}": None for n in range(1, count + 1)}


def _indexed(folder: Folder, index: str) -> dict[str, set[str]]:
    """Each shard with the tensors that the index promises in it."""
    weight_map = folder.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise CheckpointError(f"{folder.path / index}: no weight_map of tensors and files; fetch the file again")
    shards: dict[str, set[str]] = {file: set() for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        shards[file].add(name)
    for file in shards:
        folder.file(file)  # which must lie in the directory
    return shards


def _none(path: Path, names: list[str]) -> str:
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        readable = any(name.startswith("pytorch_model") for name in pickles)
        remedy = "pass --allow-pickle to read tensors alone, or " if readable else ""
        return (
            f"{path}: weights only as pickle ({pickles[0]}), which can run code when read; {remedy}"
            "convert them with `save_pretrained` (it writes safetensors) and try again"
        )
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"{path}: weights only as {gguf}, which is quantised or made for llama.cpp; use the original model"
    return f"{path}: no weights (neither {SINGLE} nor {INDEX})"


def header(folder: Folder, name: str) -> dict[str, TensorInfo]:
    """The tensors of one file, here or on the Hub. Raises CheckpointError: damaged, or of a dtype that is not read."""
    file = folder.file(name)
    if not file.is_file() and folder.header is not None:
        return {key: TensorInfo(spec.shape, spec.dtype, file) for key, spec in folder.header(name).items()}
    if file.suffix == ".bin":
        return {key: TensorInfo(tuple(t.shape), t.dtype, file) for key, t in _unpickled(file).items()}
    with _opened(file), file.open("rb") as data:  # opened: all places are within the file and none is used twice
        text = data.read(int.from_bytes(data.read(8), "little"))
        begin = data.tell()
    # Of an object that names a key twice readers differ in which of the two they take.
    named = Counter(json.loads(text, object_pairs_hook=lambda pairs: [name for name, _ in pairs]))
    if twice := next((name for name, count in named.items() if count > 1), None):
        raise CheckpointError(f"{file}: damaged: tensor {twice} stands there twice; fetch the file again")
    described = json.loads(text)
    described.pop("__metadata__", None)
    return {
        key: TensorInfo(tuple(d["shape"]), dtype_of(d["dtype"], key, file), file, begin + d["data_offsets"][0])
        for key, d in sorted(described.items())
    }


def dtype_of(kind: str, tensor: str, file: str | Path) -> torch.dtype:
    """The dtype that a safetensors header names. Raises CheckpointError for one that is not read."""
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {tensor} has dtype {kind}, which is not read; use the model in 16 or 32 bits"
        )
    return DTYPES[kind]


def read(info: TensorInfo, name: str) -> torch.Tensor:
    """A tensor of a file, in its stored dtype, on the CPU: a private map of its bytes alone, freed with it.

    Raises:
        CheckpointError: the file is damaged, or not fetched from the Hub yet.
    """
    if info.file.suffix == ".bin":
        return _unpickled(info.file)[name].contiguous()
    if (extent := info.extent) is None:
        raise CheckpointError(f"{info.file}: not fetched from the Hub yet")
    if not extent.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    before = extent.start % mmap.ALLOCATIONGRANULARITY  # maps begin at a page
    try:
        with info.file.open("rb") as data:
            begin, length = extent.start - before, before + extent.nbytes
            mapped = mmap.mmap(data.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{info.file}: changed since it was opened ({error}); start again") from error
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error.strerror})") from error
    return torch.frombuffer(mapped, dtype=info.dtype, offset=before).reshape(info.shape)


def _opened(file: Path):
    """A safetensors file. Raises CheckpointError: damaged, or too large to map."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); fetch the file again") from error
    except (RuntimeError, MemoryError) as error:  # a private map of the whole file counts as memory
        raise CheckpointError(f"{file}: too large to map ({error}); save the model in smaller shards") from error


def _unpickled(file: Path) -> Mapping[str, torch.Tensor]:
    """A pickle's tensors, mapped where its format allows it."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip file, cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: holds more than tensors, or is damaged ({reason}); fetch it again") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file}: no dictionary of tensors; convert the model with `save_pretrained`")
    return tensors

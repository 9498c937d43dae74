import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import TABLE
from zoo import Checkpoint, CheckpointError

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny llama, in one file and in several."""
    model, root = TABLE[0].model(seed=0), tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="150KB")
    return root


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_one_file_and_shards_read_like_safetensors(single, sharded):
    expected = load_file(single / "model.safetensors")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert_same(Checkpoint.open(single), expected)
    checkpoint = Checkpoint.open(str(sharded))
    assert_same(checkpoint, expected)
    assert sorted({info.file for info in checkpoint.tensors.values()}) == files
    assert checkpoint.config == json.loads((sharded / "config.json").read_text())


def test_shards_without_an_index_are_all_read(single, sharded):
    (sharded / INDEX).unlink()
    assert_same(Checkpoint.open(sharded), load_file(single / "model.safetensors"))
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    shutil.copy(first, last)
    refused(sharded, f"{last.name}: tensor .* is in another shard too; fetch the model again")
    last.unlink()
    first.unlink()
    refused(sharded, f"shards missing: {first.name}")


@pytest.mark.parametrize("kind", ["one file", "shards", "shards without an index"])
def test_pickles_are_read_with_leave(single, sharded, kind):
    """As transformers saved them before safetensors."""
    path = single if kind == "one file" else sharded
    expected = load_file(single / "model.safetensors")
    for file in path.glob("*.safetensors"):
        torch.save(load_file(file), path / f"{file.stem.replace('model', 'pytorch_model')}.bin")
        file.unlink()
    if kind == "shards":
        text = (path / INDEX).read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (path / "pytorch_model.bin.index.json").write_text(text)
    (path / INDEX).unlink(missing_ok=True)
    refused(path, r"weights only as pickle \(pytorch_model.*\.bin\).*pass --allow-pickle to read tensors alone")
    assert_same(Checkpoint.open(path, allow_pickle=True), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_format_is_read_as_it_is_stored(tmp_path, dtype):
    model = TABLE[0].model(seed=0).to(dtype)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    assert_same(Checkpoint.open(tmp_path), expected)


@pytest.fixture
def huge(tmp_path) -> Path:
    """Four gigabytes of weights, in a sparse file."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_opening_reads_headers_only(huge):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info = Checkpoint.open(huge).tensors["w"]
    assert (info.shape, info.dtype, info.nbytes) == ((2**30,), torch.float32, 2**32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_file_too_large_for_this_machine_asks_for_shards(huge):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    try:
        refused(huge, r"too large to map \(.*Cannot allocate memory.*\); save the model in smaller shards")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_single_file_wins_over_an_old_index_like_in_transformers(single):
    (single / INDEX).write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    assert_same(Checkpoint.open(single), load_file(single / "model.safetensors"))


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"])
def test_a_bad_config_is_named(single, content):
    file = single / "config.json"
    if content is None:
        file.unlink()
        return refused(single, r"not a model directory \(no config.json\)")
    file.write_bytes(content.encode(errors="surrogateescape"))
    return refused(single, r"config.json: (cannot be read as JSON|not a JSON object).*; fetch the file again")


def test_a_directory_that_is_not_there_is_no_model(tmp_path):
    refused(tmp_path / "absent", "not a model directory")


def test_missing_shards_are_counted_and_named(sharded):
    first, second, *rest = sorted(file.name for file in sharded.glob("*.safetensors"))
    (sharded / first).unlink()
    refused(sharded, f"1 of {len(rest) + 2} shards missing: {first}; fetch the model again")
    (sharded / second).unlink()
    refused(sharded, f"2 of {len(rest) + 2} shards missing: {first}, {second};")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(sharded, keep):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(sharded, rf"{shard.name}: truncated or damaged \(.*\); fetch the file again")


def test_a_pointer_in_place_of_a_shard_is_named(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(single, r"model.safetensors: truncated or damaged")


def test_an_index_that_names_a_tensor_of_no_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.extra.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"{shard}: tensor model.extra.weight is in the index but not in the shard; fetch both again")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"w": 1}}'])
def test_an_index_without_files(sharded, content):
    (sharded / INDEX).write_text(content)
    refused(sharded, "no weight_map of tensors and files; fetch the file again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_never_read(single, name):
    (single / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, single / name)
    refused(single, rf"weights only as pickle \({name}\).*can run code.*convert them with `save_pretrained`")


def test_an_adapter_is_told_apart_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "a LoRA adapter, not a full checkpoint; merge it into its base first")


def test_a_model_without_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, r"no weights \(neither model.safetensors nor model.safetensors.index.json\)")


def test_a_format_that_is_not_read_names_the_tensor(single):
    save_file({"model.w": torch.zeros(1, dtype=torch.uint16)}, single / "model.safetensors")
    refused(single, "tensor model.w has dtype U16, which is not read")

"""What a model's content is: where its tensors lie, and the one hash of it all."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import save_adapter
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from zoo import Checkpoint, CheckpointError, Group, SourceError, TensorSpec, Writer, check
from zoo.reading.contents import Hashes
from zoo.reading.model import Extent, Model

LLAMA, QWEN2 = TABLE[:2]


def at(extent: Extent) -> bytes:
    return extent.file.read_bytes()[extent.start :][: extent.nbytes]


def assert_extents(model: Model) -> set[str]:
    """Every extent holds what is read; the names of the tensors that have one."""
    found = {name: extent for name in model.tensors if (extent := model.extent(name)) is not None}
    for name, extent in found.items():
        tensor = model.read(name)
        assert extent.nbytes == model.tensors[name].nbytes and tensor.dtype == model.tensors[name].dtype
        assert at(extent) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), name
    return set(found)


def test_extents_of_a_checkpoint_hold_every_tensor(architecture, groups):
    model = Checkpoint.open(groups(architecture).base.location)
    assert assert_extents(model) == set(model.tensors)


ADAPTERS = {  # settings of PEFT, and the ends of the tensors' names that are not stored anywhere as they are
    "factors": ({"target_modules": ["q_proj"]}, ("q_proj.weight",)),
    "biases": ({"target_modules": ["q_proj"], "bias": "lora_only"}, ("q_proj.weight",)),
    "bias of B": ({"target_modules": ["q_proj"], "lora_bias": True}, ("q_proj.weight", "q_proj.bias")),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ("q_proj.weight",)),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, ("q_proj.weight", "embed_tokens.weight")),
}


@pytest.mark.parametrize(("options", "made"), ADAPTERS.values(), ids=list(ADAPTERS))
def test_extents_of_an_adapter_hold_what_it_leaves_alone_or_stores_whole(groups, tmp_path, options, made):
    base = groups(QWEN2).base.location
    verdict = check(Group.of(base, {"a": save_adapter(Path(base), tmp_path / "a", **options)}))
    model = verdict.experts["a"]
    without = {name for name in model.tensors if name.endswith(made)}
    assert without and set(model.tensors) - assert_extents(model) == without


def test_extents_of_arranged_models_hold_what_is_not_arranged(tmp_path):
    longer = perturbed(LLAMA, 1)
    longer.resize_token_embeddings(261, mean_resizing=False)
    group = Group.of(
        save_model(LLAMA.model(seed=0), tmp_path / "base"),
        {"long": save_model(longer, tmp_path / "long"), "same": save_model(perturbed(LLAMA, 2), tmp_path / "same")},
        vocabulary="union",
    )
    verdict = check(group)
    arranged = {"model.embed_tokens.weight", "lm_head.weight"}
    for model in (verdict.base, *verdict.experts.values()):
        assert set(model.tensors) - assert_extents(model) == arranged


def test_extents_of_a_stored_expert_hold_what_it_shares_with_the_base(builds):
    stored = Stored.open(builds(LLAMA)[0])
    expert = StoredExpert.of(stored, "e2")
    assert assert_extents(stored.base) == set(stored.base.tensors)
    assert set(expert.tensors) - assert_extents(expert) == set(stored.places)


def reference(model: Path) -> str:
    """The hash by plain code, as docs/checkpoint.md has it."""
    lines = []
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            for name, tensor in load_file(file).items():
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                kind = f"{name} {str(tensor.dtype)[6:]} {list(tensor.shape)}"
                lines.append((kind, hashlib.sha256(data).hexdigest()))
        elif not file.name.endswith("index.json"):
            lines.append((file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
    return hashlib.sha256("".join(f"{digest}  {what}\n" for what, digest in sorted(lines)).encode()).hexdigest()


def hashed(model: Path) -> str:
    with Hashes({"m": Checkpoint.open(model)}) as hashes:
        return hashes.result()["m"]


def test_the_hash_of_a_model_is_of_its_tensors_however_they_are_sharded(tmp_path):
    model = LLAMA.model(seed=0)
    one = save_model(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    for file in one.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert hashed(one) == hashed(tmp_path / "many") == reference(one) == reference(tmp_path / "many")


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def tensors(change):
    def changed(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        change(found)
        save_file(found, model / "model.safetensors", metadata={"format": "pt"})

    return changed


CHANGES = {
    "bit": lambda m: flip(m / "model.safetensors"),
    "dtype": tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].view(torch.int32)})),
    "shape": tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]})),
    "name": tensors(lambda t: t.update({"model.norm.weights": t.pop("model.norm.weight")})),
    "config": lambda m: (m / "config.json").write_text((m / "config.json").read_text() + " "),
    "tokenizer": lambda m: (m / "tokenizer.json").unlink(),
    "template": lambda m: (m / "chat_template.jinja").write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_the_hash_changes_with_everything_that_a_build_reads(groups, tmp_path, change):
    model = shutil.copytree(groups(LLAMA).base.location, tmp_path / "m")
    before = hashed(model)
    change(model)
    assert hashed(model) != before
    (model / "notes.txt").write_text("not read")
    assert hashed(model) == hashed(model)


def test_a_tensor_that_another_shard_holds_too_counts_as_the_one_that_the_index_names(groups, tmp_path):
    tensors = load_file(Path(groups(LLAMA).base.location) / "model.safetensors")
    name = "model.norm.weight"
    shutil.copytree(groups(LLAMA).base.location, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    save_file(tensors, tmp_path / "m/b.safetensors")
    weight_map = dict.fromkeys(tensors, "b.safetensors") | {name: "a.safetensors"}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = []
    for scale in (1, 2):
        save_file({name: scale * tensors[name]}, tmp_path / "m/a.safetensors")
        found.append(hashed(tmp_path / "m"))
    assert found[0] == hashed(Path(groups(LLAMA).base.location)) != found[1]


def test_what_is_asked_for_is_hashed_before_what_nobody_waits_for(groups, monkeypatch):
    """So that a build's journal is not far behind the build."""
    model, order = Checkpoint.open(groups(LLAMA).base.location), []
    blocks, begun = Extent.blocks, Event()

    def noted(extent):
        begun.wait()
        order.append(extent)
        return blocks(extent)

    monkeypatch.setattr(Extent, "blocks", noted)
    with Hashes({"m": model}) as hashes:
        wanted = [model.extent(name) for name in list(model.tensors)[-3:]]
        asked = [hashes.of(extent) for extent in wanted]
        begun.set()
        assert [future.result() for future in asked] == [hashlib.sha256(at(extent)).hexdigest() for extent in wanted]
        hashes.result()
    assert max(map(order.index, wanted)) < len(wanted) + 4  # threads have taken one each before


def test_a_pickle_counts_as_a_file(tmp_path):
    LLAMA.model(seed=0).config.save_pretrained(tmp_path)
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with Hashes({"m": Checkpoint.open(tmp_path, allow_pickle=True)}) as hashes:
        assert hashes.result()["m"] == reference(tmp_path)


@pytest.mark.parametrize("change", [flip, os.unlink, lambda file: os.truncate(file, 1000)])
def test_a_file_that_changes_or_goes_meanwhile_is_named(groups, tmp_path, change):
    model = Path(shutil.copytree(groups(LLAMA).base.location, tmp_path / "m"))
    opened = Checkpoint.open(model)
    with Hashes({}, {"m": opened}) as hashes:
        change(model / "model.safetensors")
        with pytest.raises(SourceError, match=r"m: .*model.safetensors was changed while it was read; start again"):
            hashes.result()


def copy(out: Path, model: Checkpoint, **options) -> None:
    with Hashes({"m": model}) as hashes, Writer(out, model.tensors, **options) as writer:
        for name in model.tensors:
            extent = model.extent(name)
            assert extent is not None
            writer.copy(name, extent, hashes.of(extent))
            writer.finish(name, {"of": name})
        writer.commit({"model_type": "llama"}, {})


@pytest.mark.parametrize("shard_size", [10**9, 50_000])
def test_a_writer_copies_bytes_and_notes_their_checksums(groups, tmp_path, shard_size):
    model = Checkpoint.open(groups(LLAMA).base.location)
    copy(tmp_path / "out", model, shard_size=shard_size)
    sums = json.loads((tmp_path / "out/checksums.json").read_text())["tensors"]
    found = Checkpoint.open(tmp_path / "out")
    assert found.tensors.keys() == model.tensors.keys() == sums.keys()
    for name in model.tensors:
        assert torch.equal(found.read(name), model.read(name)), name
        assert hashlib.sha256(at(model.extent(name))).hexdigest() == sums[name]


def test_what_cannot_be_copied_is_named_and_leaves_nothing(groups, tmp_path):
    source = Path(shutil.copytree(groups(LLAMA).base.location, tmp_path / "m"))
    model = Checkpoint.open(source)
    name = next(iter(model.tensors))
    declared = {name: TensorSpec((1,), torch.float32)}
    with Hashes({}) as hashes:
        extent = model.extent(name)
        with pytest.raises(ValueError, match="declared"), Writer(tmp_path / "out", declared) as writer:
            writer.copy(name, extent, hashes.of(extent))
        (source / "model.safetensors").unlink()
        gone = Extent(source / "model.safetensors", 0, 4)
        copied = pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read any more \(No such file")
        with copied, Writer(tmp_path / "out", declared) as writer:
            writer.copy(name, gone, hashes.of(gone))
            writer.commit({}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_leaving_does_not_wait_for_what_is_being_copied(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(bytes(64 << 20))
    extent, begun, blocks = Extent(source, 0, 64 << 20), Event(), Extent.blocks

    def slow(extent):
        for block in blocks(extent):
            begun.set()
            time.sleep(0.1)
            yield block

    with Hashes({}) as hashes, Writer(tmp_path / "out", {"w": TensorSpec((64 << 20,), torch.uint8)}) as writer:
        digest = hashes.of(extent)
        digest.result()
        monkeypatch.setattr(Extent, "blocks", slow)
        writer.copy("w", extent, digest)
        assert begun.wait(10)
        start = time.monotonic()
    assert time.monotonic() - start < 2  # of 6.4 s
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

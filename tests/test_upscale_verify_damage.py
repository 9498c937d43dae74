"""`upscale verify` on checkpoints that were damaged: each kind of damage is found, named, and left as it is."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.architectures import TABLE
from tests.cli_runs import every_file
from tests.damage import Q, change, failed, flip, reconfigure
from tests.routers import copied
from upscale import verify
from upscale.errors import LoadError

LLAMA = TABLE[0]


@pytest.fixture
def plain(builds, tmp_path) -> Path:
    """A copy of a checkpoint in one file, to change."""
    return copied(builds(LLAMA, 3, rank=8)[0], tmp_path / "out")


@pytest.fixture
def sharded(wemoes, tmp_path) -> Path:
    """A copy of one with an index and a router's file."""
    return copied(wemoes(LLAMA, vectors="sparse"), tmp_path / "out")


def ranks(*new):
    def make(section):
        section["modules"][Q]["ranks"] = list(new)

    return lambda out: reconfigure(out, make)


def scaled(down):
    down[3] *= 1.001
    return down


def broken(value):
    value[1] = torch.nan
    return value


PLAIN = {
    "a byte of the base": (
        lambda out: flip(out, f"{Q}.weight"),
        {"hashes": f"tensor {Q}.weight is not what checksums.json says"},
    ),
    "a byte of a factor": (
        lambda out: flip(out, f"{Q}.experts.up"),
        {"hashes": f"tensor {Q}.experts.up is not what checksums.json says"},
    ),
    "a byte of the tokenizer": (
        lambda out: (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " "),
        {"hashes": "tokenizer.json is not what checksums.json says"},
    ),
    "a file": (
        lambda out: (out / "router_upscaled.py").unlink(),
        {
            "files": "router_upscaled.py is missing, which checksums.json names",
            "hashes": "router_upscaled.py is not what checksums.json says",
        },
    ),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), {"weights": "no weights"}),
    "not a number": (
        lambda out: change(out, "model.norm.weight", broken),
        {"finite": "tensor model.norm.weight has NaN or infinite values"},
    ),
    "no unit vectors": (
        lambda out: change(out, f"{Q}.experts.down", scaled),
        {"orthonormal": f"tensor {Q}.experts.down: rows of expert e1 are 0.002 from orthonormal, 0.0001 is allowed"},
    ),
    "no tensor of the base": (
        lambda out: change(out, "model.layers.1.input_layernorm.weight", lambda value: None),
        {"layout": "the base lacks model.layers.1.input_layernorm.weight"},
    ),
    "no tensor of the experts": (
        lambda out: change(out, f"{Q}.experts.up", lambda value: None),
        {"tensors": f"tensor {Q}.experts.up is missing"},
    ),
    "ranks of another sum": (
        ranks(8, 8, 9),
        {"tensors": f"tensor {Q}.experts.down has shape [24, 64], config.json says [25, 64]"},
    ),
    "ranks of the same sum": (
        ranks(7, 9, 8),
        {
            "orthonormal": f"tensor {Q}.experts.down: rows of expert e2 are",
            "layout": f"{Q} has ranks [7, 9, 8] in config.json and [8, 8, 8] in report.json",
        },
    ),
    "a module too few": (
        lambda out: reconfigure(out, lambda section: section["modules"].pop(Q)),
        {"tensors": f"tensor {Q}.experts.down is beyond what config.json and checksums.json name"},
    ),
    "no checksums": (
        lambda out: (out / "checksums.json").unlink(),
        {
            "files": "checksums.json is missing, which every build writes",
            "hashes": "no checksums.json, so that nobody knows whether these are the bytes that were written",
        },
    ),
    "checksums that are none": (
        lambda out: (out / "checksums.json").write_text("{"),
        dict.fromkeys(("files", "hashes", "tensors"), "checksums.json: cannot be read as JSON"),
    ),
    "checksums of others' files": (
        lambda out: (out / "checksums.json").write_text('{"tensors": {}, "files": {"../x": ""}}'),
        {"files": "x: a link out of the model's directory", "hashes": "x: a link out", "tensors": "is beyond what"},
    ),
    "no recipe": (
        lambda out: (out / "upscale.yaml").unlink(),
        {"files": "upscale.yaml is missing", "recipe": "upscale.yaml: cannot be read as a recipe"},
    ),
    "a recipe of others": (
        lambda out: (out / "upscale.yaml").write_text(
            yaml.safe_dump({**yaml.safe_load((out / "upscale.yaml").read_text()), "experts": {"e1": "x"}})
        ),
        {"recipe": "upscale.yaml has experts e1; config.json has e1, e2, e3"},
    ),
}


@pytest.mark.parametrize(("damage", "expected"), PLAIN.values(), ids=list(PLAIN))
def test_damage_is_found_and_named(plain, damage, expected):
    damage(plain)
    before = every_file(plain)
    found = failed(verify(plain, engine="none"))
    assert found.keys() == expected.keys()
    for check, message in expected.items():
        assert message in found[check][0]
    assert every_file(plain) == before


def other_router(out: Path) -> None:
    (file,) = out.glob("router-*.safetensors")
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, metadata={"format": "pt"})


SHARDED = {
    "a shard cut": (
        lambda out: (out / "model-00002-of-00002.safetensors").write_bytes(
            (out / "model-00002-of-00002.safetensors").read_bytes()[:-1]
        ),
        {"weights": "model-00002-of-00002.safetensors: truncated or damaged"},
    ),
    "a shard missing": (
        lambda out: (out / "model-00001-of-00002.safetensors").unlink(),
        {
            "files": "model-00001-of-00002.safetensors is missing, which model.safetensors.index.json names",
            "weights": "1 of 3 shards missing: model-00001-of-00002.safetensors",
        },
    ),
    "another router": (other_router, {"router": "its tensors are not those that its name stands for"}),
}


@pytest.mark.parametrize(("damage", "expected"), SHARDED.values(), ids=list(SHARDED))
def test_damage_to_shards_and_routers_is_found(sharded, damage, expected):
    damage(sharded)
    report = verify(sharded, engine="none")
    found = failed(report)
    assert found.keys() == expected.keys()
    for check, message in expected.items():
        assert message in found[check][0]
    if "weights" in found:
        assert report["finite"].detail == "needs weights" and report["layout"].status == "skipped"


def test_a_checkpoint_of_another_version_is_refused(plain):
    reconfigure(plain, lambda section: section.update(format_version=9))
    with pytest.raises(LoadError, match="format version 9"):
        verify(plain)

"""`upscale check`: one verdict from headers, of models here and on the Hub."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.adapters import save_adapter
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, inline, upscale
from tests.conftest import perturbed, save_model
from zoo import Group

LLAMA = TABLE[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checked")
    base = save_model(LLAMA.model(seed=0), root / "base")
    math = root / "math"
    perturbed(LLAMA, 1).save_pretrained(math, max_shard_size="150KB")
    return {"base": base, "math": math, "lora": save_adapter(base, root / "lora", target_modules=["q_proj"])}


@pytest.fixture(scope="module")
def licensed(models, tmp_path_factory) -> dict[str, Path]:
    """The same with cards: the base under Apache 2.0, the others under Llama's licence."""
    root = tmp_path_factory.mktemp("licensed")
    made = {name: shutil.copytree(path, root / name) for name, path in models.items()}
    for name, path in made.items():
        licence = "apache-2.0" if name == "base" else "llama3.1"
        (path / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return made


def group(models, *names) -> Group:
    return Group.of(models["base"], {name: models[name] for name in names or ("math", "lora")})


def verdict(*args) -> tuple[int, dict]:
    result = upscale("check", *args, "--json")
    return result.exit_code, json.loads(result.output)


def test_what_fits_is_told_with_sizes_and_kinds(models):
    result = upscale("check", *inline(group(models)))
    assert result.exit_code == 0
    for word in ("LoRA", "full", "not said", "ok 2 expert(s) fit the base", "free"):
        assert word in result.output
    code, found = verdict(*inline(group(models)))
    assert (code, found["ok"], found["mismatches"], found["architecture"]) == (0, True, [], "llama")
    assert {name: model["kind"] for name, model in found["models"].items()} == {
        "base": "full",
        "math": "full",
        "lora": "LoRA",
    }
    stored = load_file(models["lora"] / "adapter_model.safetensors")
    assert found["models"]["lora"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["models"]["lora"]["tensors"] == len(stored)
    assert found["needs"]["disk"] > found["needs"]["base"] == found["models"]["base"]["bytes"]


def test_the_disk_and_the_memory_are_looked_at(models, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = upscale("check", *inline(group(models)), "--out", tmp_path / "not/yet")
    assert result.exit_code == 1
    assert_one_message(result.output, "of disk, 0.00 GB are free; free some, choose another disk")
    monkeypatch.undo()
    monkeypatch.setattr("upscale.building.needs._memory_free", lambda: 1000)
    code, found = verdict(*inline(group(models)))
    assert (code, found["ok"]) == (1, False)
    assert "of memory, 0.00 GB are free; close what else is running" in found["mismatches"][0]


def test_licences_that_differ_are_told(licensed):
    code, found = verdict(*inline(group(licensed)))
    assert code == 0 and found["licence"] == "llama3.1"
    assert "licences differ; the result's is llama3.1, the strictest of them" in found["warnings"]
    (licensed["lora"] / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    code, found = verdict(*inline(group(licensed)))
    assert code == 0 and found["licence"] is None
    assert any("which licence? base: apache-2.0, math: llama3.1, lora: gpl-3.0" in line for line in found["warnings"])


def test_what_does_not_fit_and_what_is_not_there_is_json_too(models, tmp_path):
    other = save_model(TABLE[2].model(seed=0), tmp_path / "mistral")
    code, found = verdict(*inline(group({**models, "other": other}, "math", "other")))
    assert code == 1 and not found["ok"]
    assert found["mismatches"] == [
        "expert other: architecture mistral is not the base's llama; it was not fine-tuned from this base"
    ]
    code, found = verdict("--base", str(models["base"]), "--expert", f"gone={tmp_path / 'gone'}")
    assert code == 1 and "no such directory, and not a Hub id" in found["mismatches"][0]


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_of_models_on_the_hub_no_weights_are_fetched(hub, online, models):
    commits = {name: hub.add(f"checked/{name}", files_of(path)) for name, path in models.items()}
    hub.behave()
    arguments = ["--base", "checked/base", "--expert", f"math=checked/math@{commits['math']}"]
    result = online("check", *arguments, "--expert", "lora=checked/lora", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["models"]["math"]["revision"] == commits["math"]
    here = json.loads(upscale("check", *inline(group(models)), "--json").output)
    for name, model in found["models"].items():
        assert {**model, "source": "", "revision": ""} == {**here["models"][name], "source": "", "revision": ""}
    assert found["needs"]["disk"] == here["needs"]["disk"]
    shards = len(list(models["math"].glob("*.safetensors")))
    asked = [request for request in hub.requests if request.route == "lfs_get"]
    assert len(asked) >= shards + 2 and all(request.range for request in asked)
    assert not [file for file in (online.directory / "cache").rglob("*.safetensors") if "checked--" in str(file)]
    built = online("smile", *arguments, "--expert", "lora=checked/lora", "built")
    assert built.exit_code == 0, built.output
    assert (online.directory / "built/config.json").is_file()

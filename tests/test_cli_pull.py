"""`upscale pull` from a Hub, and the Hub's own command line as another client of what was pushed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")


@pytest.fixture(scope="module")
def built(builds) -> Path:
    return builds(LLAMA, 2, rank=8)[0]


@pytest.fixture
def pushed(hub, built) -> str:
    """A repository that holds the checkpoint as it is, under the tag v1; its commit."""
    if "alice/model" not in hub.repos:
        hub.add("alice/model", every_file(built))
        hub.repos["alice/model"].tags["v1"] = hub.repos["alice/model"].refs["main"]
        hub.add("alice/model", {"notes.md": b"of a later commit"})
    return hub.repos["alice/model"].tags["v1"]


def hf(hub, home: Path, *args: str | Path) -> str:
    command = [str(Path(sys.executable).with_name("hf")), *map(str, args)]
    return subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, check=True).stdout


def test_a_tag_a_commit_and_a_branch_are_pulled_as_they_are(online, built, pushed):
    for revision, name in (("@v1", "tag"), (f"@{pushed}", "commit")):
        done = online("pull", f"alice/model{revision}", f"pulled/{name}")
        assert done.exit_code == 0, done.output
        assert f"commit {pushed}" in done.output and f"wrote pulled/{name}" in done.output
        assert every_file(online.directory / "pulled" / name) == every_file(built)
    assert online("pull", "alice/model").exit_code == 0  # named like the model
    assert every_file(online.directory / "model") == {**every_file(built), "notes.md": b"of a later commit"}
    again = online("pull", "alice/model")
    assert again.exit_code == 1
    assert_one_message(again.output, "model: exists already; choose another directory or remove it")


def test_what_arrives_damaged_is_fetched_again_and_only_that(hub, online, built, pushed):
    weights = hashlib.sha256((built / "model.safetensors").read_bytes()).hexdigest()
    hub.altered = {weights}
    done = online("pull", "alice/model@v1", "damaged")
    assert done.exit_code == 1
    assert_one_message(done.output, "alice/model@v1: model.safetensors arrived damaged; run this again")
    assert not (online.directory / "damaged").exists()
    hub.behave()
    assert online("pull", "alice/model@v1", "damaged").exit_code == 0
    assert every_file(online.directory / "damaged") == every_file(built)
    fetched = [r.path for r in hub.requests if r.verb == "GET" and r.route in ("resolve", "lfs_get")]
    assert fetched == [f"/lfs/alice/model/{weights}"]


def test_what_is_left_of_a_pull_of_another_commit_does_not_stay(hub, online, built, pushed):
    hub.altered = {hashlib.sha256((built / "model.safetensors").read_bytes()).hexdigest()}
    assert online("pull", "alice/model@main", "other").exit_code == 1
    assert (online.directory / ".other.pulled/notes.md").exists()
    hub.behave()
    assert online("pull", "alice/model@v1", "other").exit_code == 0
    assert every_file(online.directory / "other") == every_file(built)


def test_a_model_that_we_did_not_build_is_pulled_too(hub, online):
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle", "original/params.json": b"{}"}
    hub.add("org/adapter", files)
    assert online("pull", "org/adapter").exit_code == 0
    assert every_file(online.directory / "adapter") == files


def test_a_model_that_was_changed_after_it_was_built_is_refused(hub, online, built):
    hub.add("alice/changed", {**every_file(built), "tokenizer_config.json": b"{}"})
    done = online("pull", "alice/changed")
    assert done.exit_code == 1
    assert_one_message(done.output, "alice/changed: tokenizer_config.json is not what checksums.json says")
    assert not (online.directory / "changed").exists()


def test_the_hubs_own_command_line_reads_what_we_push_and_we_what_it_uploads(hub, online, built, tmp_path):
    assert online("push", built, "alice/ours", "--licence", "mit").exit_code == 0
    hf(hub, tmp_path / "cache", "download", "alice/ours", "--local-dir", tmp_path / "ours")
    verified = hf(hub, tmp_path / "cache", "cache", "verify", "alice/ours", "--local-dir", tmp_path / "ours")
    assert f"checked: {len(every_file(built))}" in verified
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()
    hf(hub, tmp_path / "cache", "upload", "alice/theirs", built, "--commit-message", "theirs")
    assert online("pull", "alice/theirs").exit_code == 0
    assert every_file(online.directory / "theirs") == every_file(built)


def test_a_model_on_the_hub_is_verified_with_all_its_files(online, pushed):
    """Its runtime and its checksums too, which loading it does not need."""
    done = online("verify", "alice/model@v1", "--engine", "none")
    assert done.exit_code == 0, done.output
    assert "ok alice/model@v1" in done.output and "skipped │ no engine" in done.output

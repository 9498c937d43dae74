"""`upscale push` and `upscale pull` where they may not or cannot: one line each, and nothing sent or left."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, command, every_file, upscale

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
MIT = ("--licence", "mit")


@pytest.fixture
def built(builds) -> Path:
    return builds(LLAMA, 2, rank=8)[0]


@pytest.fixture
def checkpoint(built, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(built, tmp_path / "out")


REFUSALS = {
    "a token that is none": ("alice/no", (), "hf_forged", "the Hub wants a token that is valid: log in with"),
    "a token that reads": ("alice/no", (), "hf_read", "your token may not do this; it needs a role that writes"),
    "no member": ("acme/no", (), "hf_bob", "your token may not do this"),
    "no token": ("alice/no", (), "", "pushing needs a token that may write; log in with `hf auth login` or set"),
    "a licence of nobody": ("alice/no", ("--licence", "gpl-1"), "hf_alice", None),
    "public already": ("alice/public", ("--private",), "hf_alice", "is public already; make it private on its page"),
    "another model": ("alice/plain", (), "hf_alice", "holds another model, which would be lost; choose another name"),
    "no model": ("datasets/alice/no", (), "hf_alice", "not a model's id; write org/name"),
    "both": ("alice/no", ("--pr", "--revision", "x"), "hf_alice", "--pr and --revision exclude each other"),
}


@pytest.mark.parametrize(("repo", "options", "token", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_a_push_that_may_not_be_says_why_and_sends_nothing(hub, online, built, repo, options, token, message):
    hub.add("alice/public", {"notes.md": b""})
    hub.add("alice/plain", {"config.json": b"{}", "model.safetensors": b""})
    done = online("push", built, repo, *MIT, *options, token=token)
    if message is None:  # a licence that is not on the Hub's list goes by its name
        assert done.exit_code == 0 and b"license: other\nlicense_name: gpl-1\n" in hub.read(repo, "README.md")
        return
    assert done.exit_code == 1
    assert_one_message(done.output, message)
    assert not {"lfs_put", "commit"} & set(hub.routes())


def test_a_card_that_the_hub_refuses_stops_it_before_the_repository_is_made(hub, online, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: my-own\n---\n# Mine\n")
    done = online("push", checkpoint, "alice/card")
    assert done.exit_code == 1
    assert_one_message(done.output, 'alice/card: the Hub refuses README.md: {"error": ')
    assert "alice/card" not in hub.repos


def test_a_dry_run_shows_what_would_be_sent_and_needs_no_hub(checkpoint):
    """In this process, which is offline and has no token."""
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / ".left.partial").mkdir()
    (checkpoint / ".left.partial/0.safetensors").write_bytes(b"half")
    (checkpoint / "LICENSE").write_text("the text")
    done = upscale("push", checkpoint, "alice/dry", "--dry-run", "--license", "apache-2.0")
    assert done.exit_code == 0, done.output
    assert "left out, no part of a checkpoint: .left.partial/0.safetensors, notes.txt" in done.output
    assert "upscale.yaml is sent without the directories of local sources" in done.output
    table = done.output.partition("\nREADME.md")[0]
    for name in every_file(checkpoint).keys() - {"notes.txt", ".left.partial/0.safetensors"}:
        assert f" {name} " in table
    assert "notes.txt │" not in table and "licence apache-2.0" in table
    assert "license: apache-2.0" in done.output and 'upscale.load("alice/dry")' in done.output


def changed(file: str, text: str):
    return lambda checkpoint: (checkpoint / file).write_text(text)


def linked(checkpoint: Path) -> None:
    (checkpoint.parent / "secret").write_text("{}")
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "tokenizer_config.json").symlink_to(checkpoint.parent / "secret")


def flipped(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


BROKEN = {
    "no licence": (lambda c: None, (), "which licence? base: not said, e1: not said, e2: not said; read what"),
    "not built": (lambda c: (c / "upscale.yaml").unlink(), MIT, "not a checkpoint that upscale built"),
    "no model": (lambda c: (c / "config.json").unlink(), MIT, "not a model directory (no config.json)"),
    "no card": (changed("README.md", "---\nlicense: [\n---\n"), MIT, "README.md: its metadata cannot be read"),
    "own card": (changed("README.md", "# Mine\n"), (), "which licence? README.md does not say one"),
    "no results": (changed("eval.json", "{}"), MIT, "eval.json: no results of an evaluation"),
    "a link": (linked, MIT, "tokenizer_config.json: a link out of the model's directory"),
    "a tensor": (flipped, MIT, "is not what checksums.json says; build it again, or push with --no-verify"),
    "a file": (changed("tokenizer_config.json", "{}"), MIT, "tokenizer_config.json is not what checksums.json says"),
    "a shard": (lambda c: (c / "model.safetensors").unlink(), MIT, "no weights"),
}


@pytest.mark.parametrize(("breaks", "options", "message"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_not_fit_to_be_pushed_is_refused_before_the_hub_is_asked(checkpoint, breaks, options, message):
    breaks(checkpoint)
    done = upscale("push", checkpoint, "alice/dry", *options, "--dry-run")
    assert done.exit_code == 1
    assert_one_message(done.output, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "alice/m: the Hub is not asked offline; unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "alice/m: the Hub at http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["offline", "down"],
)
def test_without_a_hub_a_pull_says_so(hub, tmp_path, change, message):
    done = subprocess.run(
        command("pull", "alice/m"),
        env={**hub.environment(tmp_path / "cache"), **change},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert_one_message(done.stderr, message)
    assert not hub.requests and not (tmp_path / "m").exists()


def test_xet_where_there_is_none_names_the_flag(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    script = """
import sys
from pathlib import Path
from zoo.errors import HubError
from zoo.hub.push import Target, push

try:
    push({"model.safetensors": Path(sys.argv[1])}, Target("alice/xet"), owned=lambda name: False, title="Push")
except HubError as error:
    print(error)
"""
    environment = {**hub.environment(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "0"}
    args = [sys.executable, "-c", script, str(tmp_path / "model.safetensors")]
    done = subprocess.run(args, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"alice/xet: {hub.url} has no Xet storage; use --no-xet, or set HF_HUB_DISABLE_XET=1\n"
    assert hub.repos["alice/xet"].files() == {}

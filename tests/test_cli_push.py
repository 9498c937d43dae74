"""`upscale push` and `upscale pull` with a Hub: one commit or none, nothing twice, and each refusal one line."""

import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import yaml

import upscale as library
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from tests.hub import Hub
from upscale import router_file

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
SENT_OTHERWISE = {"README.md", "upscale.yaml"}
UPLOADS = {"lfs_put", "lfs_part", "preupload", "commit"}
MIT = ("--licence", "mit")
PUSH = """
import sys
from pathlib import Path
from zoo.hub.push import Target, push

files = {file.name: file for file in Path(sys.argv[1]).iterdir()}
push(files, Target(sys.argv[2]), owned=lambda name: False, title="Push")
"""


@pytest.fixture(scope="module")
def built(groups, tmp_path_factory) -> Path:
    """A checkpoint of two LFS files: the experts' and the router's."""
    out = tmp_path_factory.mktemp("built") / "out"
    library.wemoe(groups(LLAMA, 2), out, rank=4)
    return out


@pytest.fixture
def checkpoint(built, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(built, tmp_path / "out")


def wait_for(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_holds(hub: Hub, repo: str, checkpoint: Path, revision: str = "main") -> None:
    """The repository has the checkpoint's files and no others, byte for byte but for those that are sent otherwise."""
    files = every_file(checkpoint)
    assert hub.repos[repo].files(revision).keys() == files.keys()
    for name in files.keys() - SENT_OTHERWISE:
        assert hub.read(repo, name, revision) == files[name], name


def other_router(checkpoint: Path) -> tuple[str, str]:
    """Give the checkpoint another router, in a file of another name; returns the names of both files."""
    (old,) = checkpoint.glob("router-*.safetensors")
    (settings, values), (_, layout) = router_file.stored(checkpoint), router_file.opened(checkpoint)
    router_file.replace(checkpoint, layout, settings, {n: value + 1 for n, value in values.items()}, {"by": "hand"})
    (new,) = checkpoint.glob("router-*.safetensors")
    return old.name, new.name


def test_a_push_is_one_commit_and_the_same_again_is_none(hub, online, built):
    first = online("push", built, "alice/one", *MIT)
    assert first.exit_code == 0, first.output
    repo = hub.repos["alice/one"]
    assert len(repo.titles()) == 2 and not repo.private
    assert f"pushed {hub.url}/alice/one/commit/{repo.refs['main']}" in first.output
    assert_holds(hub, "alice/one", built)
    recipe, sent = yaml.safe_load((built / "upscale.yaml").read_text()), hub.read("alice/one", "upscale.yaml")
    assert str(built.parent.parent).encode() not in sent
    assert yaml.safe_load(sent) == {**recipe, "base": "base", "experts": {"e1": "e1", "e2": "e2"}}
    hub.behave()
    again = online("push", built, "alice/one", *MIT)
    assert again.exit_code == 0 and "unchanged" in again.output
    assert not UPLOADS & set(hub.routes()) and len(repo.titles()) == 2


def test_a_new_version_takes_the_old_ones_files_away_and_nobody_elses(hub, online, built, checkpoint):
    assert online("push", built, "alice/versions", *MIT).exit_code == 0
    hub.add("alice/versions", {".gitattributes": b"", "notes.md": b"by hand", "old.png": b"by hand"})
    old, new = other_router(checkpoint)
    hub.behave()
    pushed = online("push", checkpoint, "alice/versions", *MIT)
    assert pushed.exit_code == 0, pushed.output
    assert f"3 file(s) sent, 1 deleted: {old}" in pushed.output
    assert hub.routes().count("lfs_put") == 1 and len(hub.repos["alice/versions"].titles()) == 4
    files = hub.repos["alice/versions"].files().keys()
    assert files == every_file(checkpoint).keys() | {".gitattributes", "notes.md", "old.png"}
    assert new in files and old not in files


def test_the_hub_failing_for_a_moment_is_no_failure(hub, online, built):
    hub.fail = {"validate": 1, "info": 1, "lfs_put": 1, "commit": 1}
    pushed = online("push", built, "alice/moment", *MIT)
    assert pushed.exit_code == 0, pushed.output
    assert_holds(hub, "alice/moment", built)
    assert hub.routes().count("commit") == 2 and len(hub.repos["alice/moment"].titles()) == 2
    assert hub.routes().count("lfs_put") == 3
    hub.behave()
    hub.drop = {"commit": 1}  # which is made; the next try finds it
    assert online("push", built, "alice/lost", *MIT).exit_code == 0
    assert_holds(hub, "alice/lost", built)
    assert hub.routes().count("commit") == 1 and len(hub.repos["alice/lost"].titles()) == 2


def test_a_push_that_was_killed_goes_on_where_it_was(hub, online, built, tmp_path):
    """The router's file is there, the experts' half there, when the process is killed; nobody sees either."""
    (router,) = built.glob("router-*.safetensors")
    hub.part_size = router.stat().st_size + 1
    hub.hold["lfs_complete"] = Event()
    args = [sys.executable, "-c", PUSH, str(built), "alice/killed"]
    with subprocess.Popen(args, env=hub.environment(tmp_path), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: {"lfs_verify", "lfs_complete"} <= set(hub.routes()))
        process.send_signal(signal.SIGKILL)
    assert hub.repos["alice/killed"].files() == {}
    hub.behave()
    assert online("push", built, "alice/killed", *MIT).exit_code == 0
    assert_holds(hub, "alice/killed", built)
    assert hub.routes().count("lfs_put") == 1  # in one piece; the router's is not sent again
    assert hub.routes().count("commit") == 1


def test_a_commit_by_somebody_else_meanwhile_is_not_overwritten(hub, online, built):
    hub.hold["commit"] = Event()
    with ThreadPoolExecutor() as pool:
        push = pool.submit(online, "push", built, "alice/race", *MIT)
        wait_for(lambda: "commit" in hub.routes())
        theirs = hub.add("alice/race", {"README.md": b"theirs"})
        hub.hold["commit"].set()
        done = push.result()
    assert done.exit_code == 1
    assert_one_message(done.output, "alice/race: somebody else changed it meanwhile; look at the change, then run this")
    assert hub.repos["alice/race"].refs["main"] == theirs


def test_a_branch_is_made_and_a_pull_request_changes_none(hub, online, built, checkpoint):
    assert online("push", built, "alice/branches", "--revision", "v2", *MIT).exit_code == 0
    repo = hub.repos["alice/branches"]
    assert repo.files() == {} and repo.files("v2").keys() == every_file(built).keys()
    asked = online("push", built, "alice/branches", "--pr", *MIT)
    assert asked.exit_code == 0 and f"{hub.url}/alice/branches/discussions/1" in asked.output
    assert repo.files() == {} and repo.files("refs/pr/1").keys() == every_file(built).keys()
    other_router(checkpoint)
    assert online("push", checkpoint, "alice/branches", "--revision", "v2", *MIT).exit_code == 0
    assert len(repo.titles("v2")) == 3

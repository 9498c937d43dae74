"""Shared fixtures: tiny groups on disk, a tokenizer, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.architectures import TABLE, Architecture
from tests.hub import Hub, running_hub
from tests.hub_client import Client, client
from upscale import smile, wemoe
from zoo import Group
from zoo.demo.tokenizer import save_tokenizer


def save_model(model, directory: Path) -> Path:
    """A checkpoint with the byte-level tokenizer of the demo zoo."""
    model.save_pretrained(directory)
    save_tokenizer(directory, max_length=256)
    return directory


def perturbed(architecture: Architecture, seed: int, *, names: Callable[[str], bool] = lambda name: True, scale=0.05):
    """A fine-tune of the architecture's seed-0 model: random deltas on the parameters whose name ``names`` accepts."""
    model = architecture.model(seed=0)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if names(name):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=TABLE, ids=lambda architecture: architecture.name)
def architecture(request) -> Architecture:
    return request.param


@pytest.fixture(scope="session")
def groups(tmp_path_factory) -> Callable[[Architecture, int], Group]:
    """A group of an architecture with so many fine-tunes, ``e1``, ``e2`` ...; made once per session."""
    made: dict[tuple[str, int], Group] = {}

    def group(architecture: Architecture, experts: int = 3) -> Group:
        key = (architecture.name, experts)
        if key not in made:
            root = tmp_path_factory.mktemp(f"{architecture.name}-{experts}")
            base = save_model(architecture.model(seed=0), root / "base")
            tunes = {f"e{n}": save_model(perturbed(architecture, n), root / f"e{n}") for n in range(1, experts + 1)}
            made[key] = Group.of(base, tunes)
        return made[key]

    return group


@pytest.fixture(scope="session")
def builds(groups, tmp_path_factory):
    """``builds(architecture, experts, **options)``: directory and Report of a group's SMILE build, made once."""
    made = {}

    def build(architecture: Architecture, experts: int = 3, **options):
        key = (architecture.name, experts, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp(f"{architecture.name}-smile") / "out"
            made[key] = out, smile(groups(architecture, experts), out, **options)
        return made[key]

    return build


@pytest.fixture(scope="session")
def wemoes(groups, tmp_path_factory):
    """``wemoes(architecture, **options)``: directory of the WEMoE build of a group of three, made once."""
    made = {}

    def build(architecture: Architecture, **options) -> Path:
        key = (architecture.name, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{architecture.name}-wemoe") / "out"
            wemoe(groups(architecture, 3), made[key], **options)
        return made[key]

    return build


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[tuple[Hub, Client]]:
    with (
        running_hub(tmp_path_factory.mktemp("hub")) as hub,
        client(hub, tmp_path_factory.mktemp("online")) as run,
    ):
        yield hub, run


@pytest.fixture
def hub(running) -> Hub:
    """A Hub on the loopback that behaves, for clients in processes of their own (``hub.environment``).

    Its repositories stay for the session: each test has its own.
    """
    running[0].behave()
    return running[0]


@pytest.fixture
def online(hub, running) -> Client:
    """``online(*args, token=...)``: the `upscale` command with that Hub, in a directory of its own."""
    return running[1]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory to work in, from which nothing is to be written but OUT."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path

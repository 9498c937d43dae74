"""Routing in vLLM that is not each linear's own: routers of blocks and of the model, and a uniform mixture."""

import json
import shutil

import pytest
import torch

import upscale
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.vllm_runs import generate, logprobs, prompts, reference, vllm_engine
from upscale.runtime.routing_upscaled import ROUTERS
from zoo import Group

LENGTHS = (3, 17, 40, 100)


class Toy:
    """Looks at three hidden features: for every block, or once for the model."""

    def __init__(self, scope):
        self.scope = scope

    def __call__(self, hidden, z=None, ranks=None):
        assert z is None
        return (4 * hidden[..., :3]).softmax(dim=-1)


@pytest.fixture
def toy(builds, tmp_path):
    """Make a checkpoint of an architecture that names the router ``toy``."""

    def make(architecture):
        directory = tmp_path / architecture.name
        shutil.copytree(builds(architecture, 3, rank=16)[0], directory)
        config = json.loads((directory / "config.json").read_text())
        config["upscale"]["router"] = {"type": "toy"}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.mark.parametrize(("scope", "mode"), [("block", "eager"), ("model", "eager"), ("model", "compiled")])
def test_vllm_obeys_a_router_of_hidden_states(scope, mode, toy, monkeypatch):
    monkeypatch.setitem(ROUTERS, "toy", lambda: Toy(scope))
    out = toy(TABLE[0])
    model = upscale.load(out)
    with vllm_engine(out, enforce_eager=mode == "eager") as llm:
        for output in generate(llm, prompts(LENGTHS), prompt_logprobs=1):
            torch.testing.assert_close(logprobs(output), reference(model, output), atol=1e-3, rtol=0)


def test_equal_logits_and_all_experts_give_the_uniform_mixture(architecture, tmp_path):
    """One delta and three times that delta have the same directions, so every router sees them alike."""
    base = save_model(architecture.model(seed=0), tmp_path / "base")
    tunes = {f"x{n}": save_model(perturbed(architecture, 1, scale=0.03 * n), tmp_path / f"x{n}") for n in (1, 3)}
    out = tmp_path / "out"
    upscale.smile(Group.of(base, tunes), out, rank=10_000, top_k=2, rest="average")
    twice = perturbed(architecture, 1, scale=0.03 * 2)
    ids = torch.tensor(prompts((40,)))
    with torch.no_grad():
        torch.testing.assert_close(
            upscale.load(out)(input_ids=ids).logits, twice(input_ids=ids).logits, atol=1e-4, rtol=0
        )
    with vllm_engine(out) as llm:
        for output in generate(llm, prompts(LENGTHS)):
            torch.testing.assert_close(logprobs(output), reference(twice, output), atol=1e-4, rtol=0)

"""WEMoE in vLLM: every form of the task vectors, with routers that follow the prefix."""

import pytest
import torch

import upscale
from tests.architectures import TABLE
from tests.test_upscale_wemoe import randomise
from tests.vllm_runs import LENGTHS, assert_parity, generate, prompts, vllm_engine

BY_NAME = {architecture.name: architecture for architecture in TABLE}
RANK_ONE = {"vectors": "rank-one", "rank": 8, "router_depth": 1}


def assert_routed(model):
    """The weights differ between the tokens of a prompt, and matter."""
    ids, routed = torch.tensor(prompts([40])), []
    for size in (1.0, 0.0):
        for parameter in model.router.parameters():
            parameter.data *= size
        model.routing.trace = {}
        with torch.no_grad():
            routed.append(model(input_ids=ids).logits)
        weights, model.routing.trace = model.routing.trace, None
        assert size == 0.0 or all(len(w[0].unique(dim=0)) == 40 for w in weights.values())
    assert (routed[0] - routed[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("llama", "eager", {"rank": 16}),
        ("llama", "eager", {"vectors": "dense", "router_depth": 1, "shared_router": True}),
        ("llama", "eager", {"vectors": "sparse", "density": 0.2}),
        ("llama", "eager", RANK_ONE),
        ("gpt2", "eager", {"rank": 16, "shared_router": True}),  # biases, Conv1D
        ("qwen2", "compiled", {"rank": 16}),
    ],
)
def test_vllm_is_transformers(name, mode, options, groups, tmp_path):
    """Batches of different lengths, in chunks, answers, cached prefixes that end differently."""
    upscale.wemoe(groups(BY_NAME[name], 3), out := tmp_path / "out", **options)
    randomise(out)
    assert_routed(upscale.load(out))
    model, requests = upscale.load(out), prompts(LENGTHS)
    with vllm_engine(out, enforce_eager=mode == "eager") as llm:
        assert_parity(model, generate(llm, requests, prompt_logprobs=1))
        again = generate(llm, [*requests, [*requests[-1][:128], *prompts([20], seed=1)[0]]])
        assert [output.num_cached_tokens > 0 for output in again] == [len(r) > 32 for r in (*requests, requests[-1])]
        assert_parity(model, again)

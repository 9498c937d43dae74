"""Routers that decide at every token, from the tokens up to it or from other layers, in vLLM."""

import pytest

import upscale
from tests.architectures import TABLE
from tests.vllm_runs import LENGTHS, assert_parity, chosen, gated, generate, preemptions, prompts, vllm_engine

BY_NAME = {architecture.name: architecture for architecture in TABLE}


def assert_parity_in_all_ways(model, llm):
    """Batches of different lengths, in chunks, answers, cached prefixes that end differently."""
    requests = prompts(LENGTHS)
    assert_parity(model, generate(llm, requests, prompt_logprobs=1))
    assert_parity(model, generate(llm, requests))
    again = generate(llm, [*requests, [*requests[-1][:128], *prompts([20], seed=1)[0]]])
    assert [output.num_cached_tokens > 0 for output in again] == [len(r) > 32 for r in (*requests, requests[-1])]
    assert_parity(model, again)


@pytest.mark.parametrize(
    ("name", "mode", "depth", "router"),
    [
        ("llama", "eager", 0, {"half_life": 8.0}),
        ("llama", "compiled", 1, {"half_life": 8.0}),
        ("qwen2", "eager", 1, {"top_k": 2}),
        ("gpt2", "eager", 1, {}),
        ("gemma2", "eager", 1, {"top_k": None, "base": False}),  # layers of a sliding window beside full ones
        ("gemma2", "eager", 0, {}),
    ],
)
def test_a_calibrated_router_follows_the_prefix(name, mode, depth, router, builds, tmp_path):
    architecture = BY_NAME[name]
    settings = {"depth": depth, "granularity": "prefix", "top_k": 1, **router}
    built, _ = builds(architecture, 3, rank=16)
    out = gated(built, tmp_path / "out", architecture.config().hidden_size, **settings)
    model = upscale.load(out)
    assert len(chosen(model, prompts(LENGTHS))) > 2
    with vllm_engine(out, enforce_eager=mode == "eager") as llm:
        assert_parity_in_all_ways(model, llm)


def test_a_preempted_request_goes_on_as_before(builds, tmp_path):
    llama = BY_NAME["llama"]
    built, _ = builds(llama, 3, rank=16)
    out = gated(built, tmp_path / "out", 64, depth=1, granularity="prefix", top_k=1)
    model = upscale.load(out)
    with vllm_engine(out, num_gpu_blocks_override=24) as llm, preemptions() as preempted:
        assert_parity_in_all_ways(model, llm)
        assert not preempted.called
        assert_parity(model, generate(llm, prompts([60] * 8, seed=2), tokens=60))  # 32 blocks, of which there are 23
        assert preempted.called


@pytest.mark.parametrize(
    ("name", "scope", "granularity"),
    [
        ("llama", "linear", "prefix"),
        ("gpt2", "block", "prefix"),
        ("qwen2", "model", "prefix"),
        ("gemma2", "model", "token"),
    ],
)
def test_projections_speak_for_other_layers_and_the_prefix(name, scope, granularity, builds):
    out, _ = builds(BY_NAME[name], 3, rank=16, router_rank=4, scope=scope, granularity=granularity)
    model = upscale.load(out)
    with vllm_engine(out) as llm:
        assert_parity_in_all_ways(model, llm)


def test_a_router_for_all_layers_refuses_pipeline_stages(builds):
    out, _ = builds(BY_NAME["llama"], 3, rank=16, router_rank=4, scope="model", granularity="prefix")
    with (
        pytest.raises(ValueError, match="does not work across pipeline stages; use tensor parallelism"),
        vllm_engine(out, pipeline_parallel_size=2),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no expert poetry in this model; it has e1, e2, e3 and base"),
        vllm_engine(out, additional_config={"upscale": {"expert": "poetry"}}),
    ):
        pass

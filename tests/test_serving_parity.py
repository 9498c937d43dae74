"""vLLM gives the numbers that transformers gives: every architecture of the table, eager and compiled."""

import pytest
import torch

import upscale
from tests.architectures import TABLE
from tests.conftest import save_model
from tests.vllm_runs import generate, logprobs, prompts, reference, vllm_engine
from zoo import Group

LENGTHS = (3, 17, 40, 100, 150)  # the last two are prefilled in chunks
TOLERANCE = 1e-3
RUNS = [(row, mode) for row in TABLE for mode in ("eager", "compiled") if row.compiled or mode == "eager"]


def assert_parity(model, outputs, tolerance=TOLERANCE):
    for output in outputs:
        torch.testing.assert_close(logprobs(output), reference(model, output), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "mode"), RUNS, ids=lambda run: getattr(run, "name", run), indirect=["architecture"]
)
def test_vllm_equals_transformers(architecture, mode, builds):
    out, _ = builds(architecture, 3, rank=8, router_rank=4, top_k=2, lm_head=True, rest="average")
    model = upscale.load(out)
    requests = prompts(LENGTHS)
    with vllm_engine(out, enforce_eager=mode == "eager") as llm:
        assert_parity(model, generate(llm, requests, prompt_logprobs=1))  # one batch of different lengths
        first = generate(llm, requests)
        assert_parity(model, first)
        again = generate(llm, [*requests, [*requests[-1], *prompts([9], seed=1)[0]]])  # a prefix seen before
        assert [output.num_cached_tokens > 0 for output in again] == [len(r) > 32 for r in (*requests, requests[-1])]
        assert_parity(model, again)
        assert [o.outputs[0].token_ids for o in again[:-1]] == [o.outputs[0].token_ids for o in first]
        alone = [generate(llm, [request])[0] for request in requests]
        assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in first]


def test_full_rank_and_one_expert_is_the_fine_tune(architecture, groups, tmp_path):
    group = groups(architecture, 1)
    upscale.smile(group, tmp_path / "out", rank=10_000, lm_head=True, rest="average")
    fine_tune = upscale.load(group.experts["e1"].location)
    with vllm_engine(tmp_path / "out") as llm:
        assert_parity(fine_tune, generate(llm, prompts(LENGTHS)), tolerance=1e-4)


def test_forced_expert_in_a_full_rank_group_is_base_plus_its_linears(architecture, groups, tmp_path):
    group = groups(architecture, 2)
    out = tmp_path / "out"
    upscale.smile(group, out, rank=10_000)
    expected = upscale.load(group.base.location)
    expert = dict(upscale.load(group.experts["e2"].location).named_parameters())
    changed = set(upscale.load(out).layout.modules)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name.rpartition(".")[0] in changed:
                parameter.copy_(expert[name])
    with vllm_engine(out, additional_config={"upscale": {"expert": "e2"}}) as llm:
        assert_parity(expected, generate(llm, prompts(LENGTHS)), tolerance=1e-4)


def test_experts_equal_to_the_base_give_the_base(architecture, groups, tmp_path):
    base = groups(architecture, 1).base
    copy = save_model(upscale.load(base.location), tmp_path / "copy")
    upscale.smile(Group.of(base.location, {"a": copy, "b": copy}), tmp_path / "out", rank=4, router_rank=2)
    with vllm_engine(base.location) as llm:
        plain = [logprobs(output) for output in generate(llm, prompts(LENGTHS))]
    with vllm_engine(tmp_path / "out") as llm:
        upscaled = [logprobs(output) for output in generate(llm, prompts(LENGTHS))]
    for a, b in zip(plain, upscaled, strict=True):
        assert torch.equal(a, b)

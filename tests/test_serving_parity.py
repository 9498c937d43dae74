"""vLLM gives the numbers that transformers gives, under SMILE's own router or with an expert forced."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

import upscale
from serving.engine import VllmEngine
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.vllm_runs import LENGTHS, assert_parity, generate, logprobs, prompts, vllm_engine
from upscale.config import EvalConfig
from upscale.errors import EngineError
from zoo import Group

BY_NAME = {architecture.name: architecture for architecture in TABLE}


def some(*names):
    return pytest.mark.parametrize("architecture", [BY_NAME[name] for name in names], ids=names, indirect=True)


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [*((row, "eager") for row in TABLE), (BY_NAME["qwen2"], "compiled")],
    ids=lambda value: getattr(value, "name", value),
    indirect=["architecture"],
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


@some("gpt2")
def test_full_rank_and_one_expert_is_the_fine_tune(architecture, groups, tmp_path):
    """Embeddings, positions, norms and head too: a single expert is always on."""
    group = groups(architecture, 1)
    upscale.smile(group, tmp_path / "out", rank=10_000)
    with vllm_engine(tmp_path / "out") as llm:
        assert_parity(upscale.load(group.experts["e1"].location), generate(llm, prompts(LENGTHS)))


@some("qwen2", "gpt2")
def test_an_engine_for_one_expert_of_full_rank_is_its_fine_tune(architecture, groups, builds):
    group = groups(architecture, 3)
    out, _ = builds(architecture, 3, rank=10_000)
    with vllm_engine(out, additional_config={"upscale": {"expert": "e2"}}) as llm:
        assert_parity(upscale.load(group.experts["e2"].location), generate(llm, prompts(LENGTHS), prompt_logprobs=1))
        with pytest.raises(VLLMValidationError, match="this engine routes every request to e2, not to e1"):
            generate(llm, prompts([3]), experts=["e1"])
        assert_parity(upscale.load(group.experts["e2"].location), generate(llm, prompts([17]), experts=["e2"]))
        engine = VllmEngine(str(out), EvalConfig())
        engine.llm = llm
        with pytest.raises(EngineError, match=r"vLLM refuses: .*224"):
            engine.answer(["too long" * 100], lambda _: None)


@some("llama")
def test_experts_equal_to_the_base_give_the_base(architecture, groups, tmp_path):
    base = groups(architecture, 1).base
    copy = save_model(upscale.load(base.location), tmp_path / "copy")
    upscale.smile(Group.of(base.location, {"a": copy, "b": copy}), tmp_path / "out", rank=4, router_rank=2)
    with vllm_engine(base.location) as llm:
        plain = [logprobs(output) for output in generate(llm, prompts(LENGTHS))]
    with vllm_engine(tmp_path / "out") as llm:
        upscaled = [logprobs(output) for output in generate(llm, prompts(LENGTHS))]
        with pytest.raises(
            VLLMValidationError, match="an expert for one request needs a router that decides by prompt"
        ):
            generate(llm, prompts([3]), experts=["a"])
    for a, b in zip(plain, upscaled, strict=True):
        assert torch.equal(a, b)


@some("qwen2", "gpt2")
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
        assert_parity(twice, generate(llm, prompts(LENGTHS)))

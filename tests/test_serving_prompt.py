"""A router that decides once for a prompt and its answer, in vLLM: by itself, or as each request asks."""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.exceptions import VLLMValidationError

import upscale
from tests.architectures import TABLE
from tests.vllm_runs import LENGTHS, assert_parity, chosen, gated, generate, logprobs, preemptions, prompts, vllm_engine

LLAMA = TABLE[0]
MIXED = (3, 17, 33, 40, 64, 90, 100, 150)
EXPERTS = (None, "e1", None, "e2", None, "base", "e3", None)


@pytest.fixture
def gate(builds, tmp_path):
    """``gate(architecture, **router)``: a full-rank checkpoint of three experts, routed by prompts."""

    def make(architecture, **router):
        settings = {"granularity": "prompt", "top_k": 1, **router}
        return gated(
            builds(architecture, 3, rank=10_000)[0], tmp_path / "gated", architecture.config().hidden_size, **settings
        )

    return make


def test_every_request_meets_its_expert(architecture, groups, gate):
    """Of full rank, an expert is its fine-tune, embeddings, norms and head included, whoever shares the batch."""
    group, out = groups(architecture, 3), gate(architecture)
    sources = {name: source.location for name, source in group.experts.items()}
    models = {name: upscale.load(path) for name, path in {**sources, "base": group.base.location}.items()}
    models[None] = upscale.load(out)
    requests = prompts(MIXED)
    assert len(chosen(models[None], requests)) > 2
    with vllm_engine(out) as llm:
        for options in ({"prompt_logprobs": 1}, {}, {}):
            outputs = generate(llm, requests, experts=EXPERTS, **options)
            for expert, output in zip(EXPERTS, outputs, strict=True):
                assert_parity(models[expert], [output])
        assert [output.num_cached_tokens > 0 for output in outputs] == [n > 32 for n in MIXED]
        base = [logprobs(output) for output in generate(llm, requests, experts=["base"] * len(requests))]
    if architecture.name in ("llama", "gpt2"):
        with vllm_engine(group.base.location) as llm:
            assert all(torch.equal(logprobs(o), b) for o, b in zip(generate(llm, requests), base, strict=True))


def test_requests_share_no_prefix_across_experts(gate):
    out = gate(LLAMA)
    model = upscale.load(out)
    (long,) = prompts([100])
    (free,) = [("e1", "e2", "e3", "base")[number] for number in chosen(model, [long])]  # -1 is "base"
    other = "e1" if free != "e1" else "e2"
    with vllm_engine(out, num_gpu_blocks_override=24) as llm, preemptions() as preempted:
        alone = {}
        for expert in (free, other):
            (first,) = generate(llm, [long], experts=[expert])
            (again,) = generate(llm, [long], experts=[expert])
            assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)
            alone[expert] = first.outputs[0].token_ids
        assert alone[free] != alone[other]
        outputs = generate(llm, [long] * 3, experts=[other, None, free])
        assert [output.num_cached_tokens for output in outputs] == [96, 96, 96]  # routed to it or asked for: the same
        assert [output.outputs[0].token_ids for output in outputs] == [alone[other], alone[free], alone[free]]

        (both,) = generate(llm, [long], n=2, temperature=1.0, seed=1)  # the router's decision goes to all samples
        assert both.outputs[0].token_ids != both.outputs[1].token_ids
        assert_parity(model, [both])

        for bad in ("poetry", ["e1"], 3):
            with pytest.raises(
                VLLMValidationError, match=r"no expert poetry in this model; it has e1, e2, e3 and base|one name"
            ):
                generate(llm, [long, long], experts=[free, bad])

        requests = prompts([60] * 8, seed=2)
        assert len(chosen(model, requests)) > 1
        assert not preempted.called
        assert_parity(model, generate(llm, requests, tokens=60))  # 32 blocks, of which there are 23
        assert preempted.called


def test_the_second_model_runner_gets_the_same_weights(gate):
    """On a CPU it does not run; its classes do."""
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_states import init_model_state

    from serving.compat import _older_model_state

    with vllm_engine(gate(LLAMA)) as llm:
        config, cpu = llm.llm_engine.vllm_config, torch.device("cpu")
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
        with set_current_vllm_config(config):
            state = init_model_state(config, model, None, cpu)
        assert isinstance(state, _older_model_state(config, object()))  # the fallback for versions that do not say
        address = model.prompt_weights.tensor.data_ptr()
        params = {}
        for index, expert in ((5, "e2"), (0, "e1"), (5, "e3")):  # an index that is used again
            request = llm.llm_engine.input_processor.process_inputs(
                "0", {"type": "token", "prompt_token_ids": [0, 5]}, _sampling(expert), ("generate",)
            )
            params[index] = request.sampling_params
            state.add_request(index, NewRequestData("0", [0, 5], [], request.sampling_params, None, ([],), 0, None))
        batch = InputBatch.make_dummy(3, 7, InputBuffers(4, 16, cpu))  # 2, 2 and 3 tokens
        batch.idx_mapping = torch.tensor([5, 3, 0])  # in 3, no request
        assert state.prepare_inputs(batch, None) == {}
        assert state.prepare_dummy_inputs(3, 7) == {}
        given = model.routing.given
        assert given.data_ptr() == address
        assert given[:7].tolist() == [[0, 0, 1]] * 2 + [[0, 0, 0]] * 2 + [[1, 0, 0]] * 3


def _sampling(expert):
    from vllm import SamplingParams

    return SamplingParams(extra_args={"expert": expert})


@pytest.mark.parametrize(
    ("mode", "router"),
    [("eager", {"top_k": None, "half_life": 8.0}), ("compiled", {"top_k": 2, "base": False})],
    ids=["soft", "compiled"],
)
def test_mixtures_by_prompt(mode, router, gate):
    out = gate(LLAMA, **router)
    model = upscale.load(out)
    requests = prompts(LENGTHS)
    with vllm_engine(out, enforce_eager=mode == "eager") as llm:
        for options in ({"prompt_logprobs": 1}, {}, {}):
            outputs = generate(llm, requests, **options)
            assert_parity(model, outputs)
        assert [output.num_cached_tokens > 0 for output in outputs] == [n > 32 for n in LENGTHS]

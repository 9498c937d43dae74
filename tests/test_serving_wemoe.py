"""WEMoE in vLLM: every form of the task vectors, with routers that follow the prefix."""

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest
import torch

import upscale
from serving.running import running_server
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


def test_two_hundred_concurrent_requests_answer_as_transformers_does(groups, tmp_path):
    """Mixed prompts in shared batches over HTTP: no request's mean sees another's tokens."""
    upscale.wemoe(groups(BY_NAME["llama"], 3), tmp_path / "served", rank=8)
    randomise(tmp_path / "served")
    model = upscale.load(tmp_path / "served")
    asked = prompts([3 + 7 * n % 60 for n in range(25)], seed=5)

    def in_transformers(ids):
        output = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        return output[0, len(ids) :].tolist()

    expected = [in_transformers(ids) for ids in asked]
    with running_server(tmp_path / "served", ["--max-num-seqs", "16"], tmp_path / "server.log") as url:

        def ask(number):
            body = {"model": "served", "prompt": asked[number % 25], "max_tokens": 8, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urlopen(request, timeout=120) as reply:
                return json.load(reply)["choices"][0]["token_ids"]

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(ask, range(200)))
    assert answers == [expected[number % 25] for number in range(200)]

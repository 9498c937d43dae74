"""`vllm serve org/name --revision SHA`: from a Hub to an HTTP answer, without a command of ours."""

import sys
from pathlib import Path

import openai
import pytest
import torch

import upscale
from serving.running import running
from tests.architectures import TABLE

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
PROMPTS = [[0, 5, 9, 200], [0, *range(30, 60)]]
TOKENS = 8
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 29)]


@pytest.mark.slow
def test_vllm_serves_a_commit_of_what_was_pushed_as_transformers_answers(hub, online, builds, tmp_path):
    """The branch moves on to something that cannot be served; the commit stays what it was."""
    out, _ = builds(LLAMA, 2, rank=8)
    assert online("push", out, "alice/served", "--licence", "mit").exit_code == 0
    commit = hub.repos["alice/served"].refs["main"]
    hub.add("alice/served", {"config.json": b"{}"})
    vllm = [str(Path(sys.executable).with_name("vllm")), "serve", "alice/served", "--revision", commit, *FLAGS]
    environment = hub.environment(tmp_path / "cache")
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    model = upscale.load(out, dtype="float32")
    with running(lambda address: [*vllm, *address], tmp_path / "log", environment) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for prompt in PROMPTS:
            asked = {"max_tokens": TOKENS, "temperature": 0, "model": "alice/served"}
            whole = {"return_token_ids": True, "ignore_eos": True}
            reply = client.completions.create(prompt=prompt, **asked, extra_body=whole)
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            assert reply.choices[0].token_ids == expected[0, len(prompt) :].tolist()
    assert f"/api/models/alice/served/revision/{commit}" in {request.path for request in hub.requests}

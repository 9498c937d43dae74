"""Two tensor-parallel ranks give the numbers of transformers: grouped heads, biases, a tied output head."""

import json
import os
import subprocess
import sys

import torch

import upscale
from tests.architectures import TABLE
from tests.test_upscale_wemoe import randomise
from tests.vllm_runs import gated, prompts

QWEN2 = next(architecture for architecture in TABLE if architecture.name == "qwen2")
# Ranks are processes, so the engine needs a main module that can be imported.
SCRIPT = """
import gc, json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    requests, answers, paths = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
    scores = []
    for path in paths:
        llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=128, tensor_parallel_size=2)
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in requests], sampling, use_tqdm=False)
        steps = [list(zip(o.prompt_logprobs, o.prompt_token_ids))[1:] for o in outputs]
        scores.append([[step[token].logprob for step, token in pairs] for pairs in steps])
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    json.dump(scores, open(answers, "w"))
"""


def test_two_ranks_give_the_numbers_of_transformers(builds, groups, tmp_path):
    """Projections that are summed over ranks, over the prefix; a router by prompt, with experts on embeddings; a WEMoE.

    Its whole deltas are shared out by rows and columns.
    """
    own = {"rank": 8, "router_rank": 4, "top_k": 2, "scope": "model", "granularity": "prefix"}
    width = QWEN2.config().hidden_size
    made = [
        builds(QWEN2, 3, **own)[0],
        gated(builds(QWEN2, 3, rank=16)[0], tmp_path / "gated", width, granularity="prompt", top_k=1),
        tmp_path / "sparse",
    ]
    upscale.wemoe(groups(QWEN2, 3), made[-1], vectors="sparse", density=0.3)
    randomise(made[-1])
    requests = prompts((5, 40))
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(tmp_path / "run.py"), json.dumps(requests), str(tmp_path / "scores.json")]
    subprocess.run([*command, *map(str, made)], env=environment, check=True, timeout=280, capture_output=True)
    for out, found in zip(made, json.loads((tmp_path / "scores.json").read_text()), strict=True):
        model = upscale.load(out)
        for ids, scores in zip(requests, found, strict=True):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)

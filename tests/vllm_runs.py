"""Run checkpoints in real vLLM, in this process, and score the same tokens in transformers."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

# Long prompts are prefilled in chunks of at most 64 tokens, together with other requests.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 224,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "block_size": 32,
    "enable_prefix_caching": True,
    "seed": 0,
}


@contextmanager
def vllm_engine(path: str | Path, **options) -> Iterator[LLM]:
    """``vllm.LLM`` on a checkpoint, shut down at the end."""
    llm = LLM(str(path), **{**ENGINE, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids, begun by the beginning-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(3, 259, (n - 1,), generator=generator).tolist()] for n in lengths]


def generate(llm: LLM, requests: Sequence[list[int]], tokens: int = 8, **sampling) -> list[RequestOutput]:
    """Greedy continuations of one batch, with the log-probability of every token."""
    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=1, ignore_eos=True, **sampling)
    return llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)


def logprobs(output: RequestOutput) -> torch.Tensor:
    """vLLM's log-probabilities of the generated tokens, and of the prompt's (but the first) where it gave them: [n]."""
    prompt = list(zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False))[1:]
    completion = output.outputs[0]
    steps = [*prompt, *zip(completion.logprobs, completion.token_ids, strict=True)]
    return torch.tensor([step[token].logprob for step, token in steps])


def reference(model, output: RequestOutput) -> torch.Tensor:
    """The same tokens' log-probabilities in transformers, from one uncached pass over the whole sequence: [n]."""
    ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    scores = scores.gather(-1, ids[0, 1:, None])[:, 0]
    return scores if output.prompt_logprobs is not None else scores[len(output.prompt_token_ids) - 1 :]

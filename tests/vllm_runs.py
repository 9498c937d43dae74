"""Run checkpoints in real vLLM, in this process, and score the same tokens in transformers."""

import gc
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock, patch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.core.sched.scheduler import Scheduler

import upscale
from upscale.runtime.layout_upscaled import Layout
from zoo.writing.amend import amend
from zoo.writing.part import content_key

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
LENGTHS = (3, 17, 40, 100, 150)  # the last two are prefilled in chunks


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


@contextmanager
def preemptions() -> Iterator[Mock]:
    """``call_count`` is how often a request lost its memory to others meanwhile and had to begin again."""
    preempt = Scheduler._preempt_request
    with patch.object(Scheduler, "_preempt_request", autospec=True, side_effect=preempt) as spy:
        yield spy


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids, begun by the beginning-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(3, 259, (n - 1,), generator=generator).tolist()] for n in lengths]


def generate(
    llm: LLM, requests: Sequence[list[int]], tokens: int = 8, experts: Sequence[str | None] | None = None, **sampling
) -> list[RequestOutput]:
    """Continuations of one batch, greedy by default, with the log-probability of every token.

    ``experts`` are asked for by the requests, one each; None leaves a request to the router.
    """
    given = [{"expert": expert} if expert else None for expert in experts or [None] * len(requests)]
    options = {"max_tokens": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True, **sampling}
    params = [SamplingParams(**options, extra_args=extra) for extra in given]
    return llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)


def logprobs(output: RequestOutput, sample: int = 0) -> torch.Tensor:
    """vLLM's log-probabilities of the generated tokens, and of the prompt's (but the first) where it gave them: [n]."""
    prompt = list(zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False))[1:]
    completion = output.outputs[sample]
    steps = [*prompt, *zip(completion.logprobs, completion.token_ids, strict=True)]
    return torch.tensor([step[token].logprob for step, token in steps])


def reference(model, output: RequestOutput, sample: int = 0) -> torch.Tensor:
    """The same tokens' log-probabilities in transformers: the prompt in one pass, the answer in a second one: [n]."""
    prompt = torch.tensor([output.prompt_token_ids])
    answer = torch.tensor([output.outputs[sample].token_ids])
    with torch.no_grad():
        first = model(input_ids=prompt, use_cache=True)
        second = model(input_ids=answer, past_key_values=first.past_key_values, use_cache=True)
    scores = torch.cat([first.logits, second.logits], dim=1)[0, :-1].float().log_softmax(-1)
    scores = scores.gather(-1, torch.cat([prompt, answer], dim=1)[0, 1:, None])[:, 0]
    return scores if output.prompt_logprobs is not None else scores[prompt.shape[1] - 1 :]


def assert_parity(model, outputs: Sequence[RequestOutput], tolerance: float = 1e-4) -> None:
    """vLLM's log-probabilities of all answers are those of transformers."""
    for output in outputs:
        for sample in range(len(output.outputs)):
            expected = reference(model, output, sample)
            torch.testing.assert_close(logprobs(output, sample), expected, atol=tolerance, rtol=0)


def gated(checkpoint: Path, out: Path, hidden_size: int, depth: int = 0, seed: int = 0, **settings) -> Path:
    """A copy of an upscaled checkpoint with a calibrated router of random scores, which differ between prompts."""
    shutil.copytree(checkpoint, out)
    fields = json.loads((out / "config.json").read_text())
    layout = Layout.from_config(fields["upscale"])
    experts, size = len(layout.experts), hidden_size if depth else fields["vocab_size"]
    classes = experts + settings.get("base", True)
    scores = torch.randn(size, classes, generator=torch.Generator().manual_seed(seed))
    values = {"weight": scores.T.contiguous()} if depth else {"table": 8 * scores}

    def write(bias):
        values["bias"] = bias
        names = f"router.{content_key(values)}"
        router = {"type": "calibrated", "experts": experts, "size": size, "depth": depth, "tensors": names, **settings}
        fields["upscale"] = Layout(layout.method, layout.experts, router, layout.modules).to_config()
        amend(out, "router", {f"{names}.{name}": value for name, value in values.items()}, fields, {})

    write(torch.zeros(classes))
    if depth:  # hidden states have much in common, for which one class would win every token
        write(-_mean_scores(upscale.load(out)))
    return out


def _mean_scores(model) -> torch.Tensor:
    seen, router = [], model.routing.router
    posterior = router.posterior
    router.posterior = lambda means: seen.append(means.flatten(0, 1)) or posterior(means)
    chosen(model, prompts(LENGTHS))
    return torch.cat(seen).mean(dim=0)


def chosen(model, requests: Sequence[list[int]]) -> set[int]:
    """What the router chooses for any token of these prompts, each alone: numbers of experts, -1 for none."""
    found = set()
    for ids in requests:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        decided = model.routing.router.decided
        found |= set(torch.where(decided.sum(-1) > 0, decided.argmax(-1), -1).flatten().tolist())
    return found

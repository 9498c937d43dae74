"""vLLM as an evaluation engine, in this process's charge."""

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

from serving.prompts import by_prompt
from serving.server import engine_defaults, require_vllm
from upscale.config import EvalConfig
from upscale.errors import EngineError, LoadError
from upscale.evaluating.encoding import encode_pair, windows
from upscale.loading import locate, read_config, require_expert


class VllmEngine:
    """``vllm.LLM`` with greedy sampling.

    Where the router decides by prompt, each request names the expert that is forced; else the model is loaded anew.
    """

    def __init__(self, model: str, config: EvalConfig):
        require_vllm()
        self.path, self.config = locate(model), config
        self.by_prompt = by_prompt(read_config(self.path).get("upscale"))
        self.llm, self.loaded = None, None  # the engine, and the expert that it was loaded for
        self.expert: str | None = None
        self.generated: int | None = 0

    def force(self, expert: str | None) -> None:
        """See ``upscale.evaluating.engines.Engine``; loads the model, anew if it was loaded for another expert."""
        if expert is not None:
            require_expert(self.path, expert)
        wanted = None if self.by_prompt else expert
        if self.llm is None or wanted != self.loaded:
            self.close()
            self.llm, self.loaded = self._load(wanted), wanted
        self.expert = expert

    def answer(self, prompts: Sequence[str], advance: Callable[[int], None]) -> list[str]:
        """See ``upscale.evaluating.engines.Engine``."""
        if self.config.chat:
            given: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        else:
            given = list(prompts)
        outputs = self._run(given, chat=self.config.chat, max_tokens=self.config.max_new_tokens)
        self.generated = (self.generated or 0) + sum(len(output.outputs[0].token_ids) for output in outputs)
        advance(len(prompts))
        return [output.outputs[0].text for output in outputs]

    def score(self, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]) -> list[tuple[float, int]]:
        """See ``upscale.evaluating.engines.Engine``; a text that is longer than the context is read in windows."""
        assert self.llm is not None, "force() comes first"
        tokenizer, context = self.llm.get_tokenizer(), self.llm.model_config.max_model_len - 1
        encoded = [encode_pair(tokenizer, *pair, chat=self.config.chat) for pair in pairs]
        jobs = [
            (n, ids[begin:end], first - begin)
            for n, (ids, start) in enumerate(encoded)
            for begin, first, end in windows(start, len(ids), context)
        ]
        outputs = self._run([{"prompt_token_ids": ids} for _, ids, _ in jobs], max_tokens=1, prompt_logprobs=0)
        totals = [0.0] * len(pairs)
        for (n, ids, first), output in zip(jobs, outputs, strict=True):
            said = output.prompt_logprobs
            totals[n] += sum(said[place][ids[place]].logprob for place in range(first, len(ids)))
        advance(len(pairs))
        return [(total, len(ids) - start) for total, (ids, start) in zip(totals, encoded, strict=True)]

    def route(self, prompts: Sequence[str], *, chat: bool) -> None:
        """See ``upscale.evaluating.engines.Engine``; vLLM does not say."""

    def _run(self, prompts: list[Any], *, chat: bool = False, **sampling: Any) -> list[Any]:
        assert self.llm is not None, "force() comes first"
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        run = self.llm.chat if chat else self.llm.generate
        extra = {"expert": self.expert} if self.by_prompt and self.expert is not None else None
        try:
            return run(prompts, SamplingParams(temperature=0.0, extra_args=extra, **sampling), use_tqdm=False)
        except (
            ValueError,
            VLLMValidationError,
        ) as error:  # e.g. a prompt longer than the model's context, or no chat template
            raise EngineError(f"vLLM refuses: {' '.join(str(error).split())}") from error

    def _load(self, expert: str | None):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = engine_defaults(read_config(self.path))
        if self.config.dtype != "auto":
            options["dtype"] = self.config.dtype
        from vllm import LLM

        if expert is not None:
            options["additional_config"] = {"upscale": {"expert": expert}}
        try:
            return LLM(str(self.path), use_tqdm_on_load=False, **options)
        except (ValueError, RuntimeError) as error:
            raise LoadError(f"{self.path}: vLLM cannot load it: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

"""vLLM as an evaluation engine, in this process's charge."""

import gc
import os
from collections.abc import Callable, Sequence

from serving.server import engine_defaults, require_vllm
from upscale.config import EvalConfig
from upscale.errors import EngineError, LoadError
from upscale.loading import locate, read_config, require_expert


class VllmEngine:
    """``vllm.LLM`` with greedy sampling; forcing another expert loads the model anew."""

    def __init__(self, model: str, config: EvalConfig):
        require_vllm()
        self.path, self.config = locate(model), config
        self.llm, self.expert = None, None

    def force(self, expert: str | None) -> None:
        """See ``upscale.engines.Engine``; loads the model, anew if it was loaded for another expert."""
        if expert is not None:
            require_expert(self.path, expert)
        if self.llm is None or expert != self.expert:
            self.close()
            self.llm, self.expert = self._load(expert), expert

    def answer(self, prompts: Sequence[str], advance: Callable[[int], None]) -> list[str]:
        """See ``upscale.engines.Engine``."""
        assert self.llm is not None, "force() comes first"
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=self.config.max_new_tokens)
        try:
            if self.config.chat:
                messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
                outputs = self.llm.chat(messages, sampling, use_tqdm=False)  # type: ignore[arg-type]
            else:
                outputs = self.llm.generate(list(prompts), sampling, use_tqdm=False)
        except ValueError as error:  # e.g. a prompt longer than the model's context, or no chat template
            raise EngineError(f"vLLM refuses: {' '.join(str(error).split())}") from error
        advance(len(prompts))
        return [output.outputs[0].text for output in outputs]

    def _load(self, expert: str | None):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = engine_defaults(read_config(self.path))
        if self.config.dtype != "auto":
            options["dtype"] = self.config.dtype
        from vllm import LLM

        if expert is not None:
            options["additional_config"] = {"upscale": {"expert": expert}}
        try:
            return LLM(str(self.path), **options)
        except (ValueError, RuntimeError) as error:
            raise LoadError(f"{self.path}: vLLM cannot load it: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

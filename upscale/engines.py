"""What runs a model for evaluation: transformers, an OpenAI-compatible server, or an engine found by entry point."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from upscale.config import EvalConfig
from upscale.device import check_device
from upscale.errors import EngineError
from upscale.loading import load, load_tokenizer, locate, require_expert

Advance = Callable[[int], None]  # so many more prompts are done


class Engine(Protocol):
    """Greedy answers to prompts."""

    def force(self, expert: str | None) -> None:
        """From here on, route every token to ``expert``; None for the router. Raises LoadError for an unknown one."""
        ...

    def answer(self, prompts: Sequence[str], advance: Advance) -> list[str]:
        """Answers in the order of ``prompts``. Raises EngineError."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def is_server(config: EvalConfig) -> bool:
    """Whether ``config.engine`` is a server's address: models then are names that it serves."""
    return config.engine.startswith(("http://", "https://"))


def open_engine(model: str, config: EvalConfig) -> Engine:
    """The engine that ``config.engine`` names, with ``model`` loaded.

    Raises:
        EngineError: no such engine, or it does not answer.
        LoadError, SourceError: the model cannot be loaded.
    """
    if is_server(config):
        return ServerEngine(model, config)
    if config.engine == "transformers":
        return TransformersEngine(model, config)
    found = {point.name: point for point in entry_points(group="upscale.engines")}
    if config.engine not in found:
        raise EngineError(f"no engine {config.engine!r}; there are transformers, {', '.join(sorted(found))} and URLs")
    return found[config.engine].load()(model, config)


class TransformersEngine:
    """Batches with left padding through ``generate``."""

    def __init__(self, model: str, config: EvalConfig):
        device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        self.config, self.directory = config, locate(model)
        self.model: Any = load(model, dtype=config.dtype).to(torch.device(device))
        self.tokenizer = load_tokenizer(model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.options: dict[str, str] = {}
        # Greedy is greedy, whatever the model's own generation config says; only its token ids count.
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )

    def force(self, expert: str | None) -> None:
        """See Engine."""
        if expert is not None:
            require_expert(self.directory, expert)
        self.options = {} if expert is None else {"expert": expert}

    def answer(self, prompts: Sequence[str], advance: Advance) -> list[str]:
        """See Engine; prompts of like length run together."""
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        for start in range(0, len(order), self.config.batch_size):
            batch = order[start : start + self.config.batch_size]
            encoded = self._encode([prompts[n] for n in batch])
            output = self.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=self.config.max_new_tokens,
                do_sample=False,
                **self.options,
            )
            tails = output[:, encoded["input_ids"].shape[1] :]
            for n, text in zip(batch, self.tokenizer.batch_decode(tails, skip_special_tokens=True), strict=True):
                answers[n] = text
            advance(len(batch))
        return answers

    def _encode(self, prompts: list[str]):
        if self.config.chat:
            if not self.tokenizer.chat_template:
                raise EngineError("the model has no chat template; use --prompt-template instead of --chat")
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not self.config.chat)
        return encoded.to(self.model.device)

    def close(self) -> None:
        """Drop the model."""
        del self.model


class ServerEngine:
    """Concurrent requests to an OpenAI-compatible server, which must serve ``model`` by that name."""

    def __init__(self, model: str, config: EvalConfig):
        import openai

        self.model, self.config = model, config
        self.client = openai.OpenAI(
            base_url=_api(config.engine), api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=3, timeout=600
        )
        try:
            entries = list(self.client.models.list())
        except openai.OpenAIError as error:
            raise EngineError(f"{config.engine}: no OpenAI-compatible server answers: {error}") from error
        if model not in (served := [entry.id for entry in entries]):
            raise EngineError(f"{config.engine} serves {', '.join(served)}, not {model}")
        # vLLM's server takes a repetition penalty from the model's generation config unless a request says otherwise.
        ours = any(entry.owned_by == "vllm" for entry in entries)
        self.extra = {"repetition_penalty": 1.0} if ours else {}

    def force(self, expert: str | None) -> None:
        """See Engine; a server's expert is chosen when it starts."""
        if expert is not None:
            raise EngineError("a server's expert cannot be forced by a client; use `upscale serve --expert NAME`")

    def answer(self, prompts: Sequence[str], advance: Advance) -> list[str]:
        """See Engine; prompts are in flight together."""
        import openai

        def ask(prompt: str) -> str:
            options: dict[str, Any] = {
                "model": self.model,
                "max_tokens": self.config.max_new_tokens,
                "temperature": 0.0,
            }
            options["extra_body"] = self.extra
            if self.config.chat:
                messages = [{"role": "user", "content": prompt}]
                reply = self.client.chat.completions.create(messages=messages, **options)  # type: ignore[arg-type]
                text = reply.choices[0].message.content
            else:
                text = self.client.completions.create(prompt=prompt, **options).choices[0].text
            advance(1)
            return text or ""

        try:
            with ThreadPoolExecutor(self.config.batch_size) as pool:
                return list(pool.map(ask, prompts))
        except openai.OpenAIError as error:
            raise EngineError(f"{self.config.engine}: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def _api(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"

"""An OpenAI-compatible server as an evaluation engine."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from upscale.config import EvalConfig
from upscale.errors import EngineError
from upscale.evaluating.encoding import first_scored


class ServerEngine:
    """Concurrent requests to an OpenAI-compatible server, which must serve ``model`` by that name."""

    def __init__(self, model: str, config: EvalConfig):
        import openai

        self.model, self.config = model, config
        self.generated: int | None = 0
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
        # Ids tell tokens apart that look alike, as halves of a character do.
        self.echo_extra = {**self.extra, "return_tokens_as_token_ids": True} if ours else {}

    def force(self, expert: str | None) -> None:
        """See ``engines.Engine``; a server's expert is chosen when it starts."""
        if expert is not None:
            raise EngineError("a server's expert cannot be forced by a client; use `upscale serve --expert NAME`")

    def answer(self, prompts: Sequence[str], advance: Callable[[int], None]) -> list[str]:
        """See ``engines.Engine``; prompts are in flight together."""
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.config.max_new_tokens,
            "temperature": 0.0,
            "extra_body": self.extra,
        }

        def ask(prompt: str) -> tuple[str, int | None]:
            if self.config.chat:
                messages = [{"role": "user", "content": prompt}]
                reply = self.client.chat.completions.create(messages=messages, **options)  # type: ignore[arg-type]
                text = reply.choices[0].message.content
            else:
                reply = self.client.completions.create(prompt=prompt, **options)
                text = reply.choices[0].text
            advance(1)
            return text or "", reply.usage.completion_tokens if reply.usage else None

        answers = self._together(ask, prompts)
        counts = [count for _, count in answers if count is not None]
        known = self.generated is not None and len(counts) == len(answers)
        self.generated = (self.generated or 0) + sum(counts) if known else None
        return [text for text, _ in answers]

    def score(self, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]) -> list[tuple[float, int]]:
        """See ``engines.Engine``; by completions that echo their prompt, of which a server says the log-likelihoods.

        A prompt is echoed alone too, to see where its tokens end. Texts longer than the context are refused by the
        server.
        """
        if self.config.chat and any(prompt for prompt, _ in pairs):
            raise EngineError(
                "a server scores no continuation of a chat message (choices, labels); use --prompt-template, or "
                "another --engine"
            )
        prompts = sorted({prompt for prompt, _ in pairs if prompt})
        alone = {
            "": [],
            **dict(zip(prompts, (tokens for tokens, _ in self._together(self._echo, prompts)), strict=True)),
        }

        def ask(pair: tuple[str, str]) -> tuple[float, int]:
            tokens, values = self._echo("".join(pair))
            first = first_scored(alone[pair[0]], tokens)
            advance(1)
            return sum(values[first:]), len(tokens) - first

        return self._together(ask, pairs)

    def route(self, prompts: Sequence[str], *, chat: bool) -> None:
        """See ``engines.Engine``; a server does not say."""

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _echo(self, text: str) -> tuple[list[str], list[float]]:
        """The tokens of ``text`` and their log-likelihoods; the first one's, which has none, is 0."""
        reply = self.client.completions.create(
            model=self.model,
            prompt=text,
            max_tokens=1,
            temperature=0.0,
            echo=True,
            logprobs=1,
            extra_body=self.echo_extra,
        )
        said = reply.choices[0].logprobs
        if said is None or not said.tokens or not said.token_logprobs or said.token_logprobs[0] is not None:
            raise EngineError(f"{self.config.engine} does not echo log-probabilities; it can answer, but not score")
        # The last token is the one generated: servers want to generate at least one.
        return said.tokens[:-1], [value or 0.0 for value in said.token_logprobs[:-1]]

    def _together(self, ask: Callable[[Any], Any], what: Sequence[Any]) -> list[Any]:
        import openai

        try:
            with ThreadPoolExecutor(self.config.batch_size) as pool:
                return list(pool.map(ask, what))
        except openai.OpenAIError as error:
            raise EngineError(f"{self.config.engine}: {error}") from error


def _api(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"

"""What runs a model for evaluation: the protocol, transformers, and engines found by address or entry point."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from upscale.config import EvalConfig
from upscale.device import usable_device
from upscale.errors import EngineError
from upscale.evaluating.encoding import as_chat, context_of, encode_pair, windows
from upscale.evaluating.trace import Trace
from upscale.loading import load, load_tokenizer, locate, require_expert

Advance = Callable[[int], None]  # so many more prompts are done
_LOGITS = 1 << 28  # logits computed at once: 1 GiB in float32


class Engine(Protocol):
    """Greedy answers to prompts, log-likelihoods of continuations, and where prompts are routed.

    Attributes:
        generated: tokens generated so far, or None if they cannot be counted.
    """

    generated: int | None

    def force(self, expert: str | None) -> None:
        """From here on, route every token to ``expert``; None for the router. Raises LoadError for an unknown one."""
        ...

    def answer(self, prompts: Sequence[str], advance: Advance) -> list[str]:
        """Answers in the order of ``prompts``. Raises EngineError."""
        ...

    def score(self, pairs: Sequence[tuple[str, str]], advance: Advance) -> list[tuple[float, int]]:
        """For each (prompt, continuation), the continuation's log-likelihood in nats and its tokens.

        Which tokens are scored is said in ``encoding.encode_pair``. Raises EngineError.
        """
        ...

    def route(self, prompts: Sequence[str], *, chat: bool) -> Trace | None:
        """Routing at the last token of each prompt, a row a prompt; None where nothing is routed or it is not known."""
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
        from upscale.evaluating.server_engine import ServerEngine

        return ServerEngine(model, config)
    if config.engine == "transformers":
        return TransformersEngine(model, config)
    found = {point.name: point for point in entry_points(group="upscale.evaluating.engines")}
    if config.engine not in found:
        raise EngineError(f"no engine {config.engine!r}; there are transformers, {', '.join(sorted(found))} and URLs")
    return found[config.engine].load()(model, config)


class TransformersEngine:
    """Batches of prompts of like length: padded left for ``generate``, right for scoring."""

    def __init__(self, model: str, config: EvalConfig):
        device = usable_device(config.device)
        self.config, self.directory = config, locate(model)
        self.model: Any = load(model, dtype=config.dtype).to(torch.device(device))
        self.tokenizer = load_tokenizer(model, padding_side="left", truncation_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.generated: int | None = 0
        self.expert: str | None = None
        # A token less than fits, as vLLM must generate one: all engines read the same windows.
        self.context = context_of(self.model) - 1
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
        self.expert = expert

    def answer(self, prompts: Sequence[str], advance: Advance) -> list[str]:
        """See Engine."""
        answers = [""] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts]):
            tails = self._generate([prompts[n] for n in batch], self.config.max_new_tokens, self.config.chat)
            for n, text in zip(batch, self.tokenizer.batch_decode(tails, skip_special_tokens=True), strict=True):
                answers[n] = text
            self.generated = (self.generated or 0) + self._until_end(tails)
            advance(len(batch))
        return answers

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, str]], advance: Advance) -> list[tuple[float, int]]:
        """See Engine; a text that is longer than the context is read in windows."""
        encoded = [encode_pair(self.tokenizer, *pair, chat=self.config.chat) for pair in pairs]
        jobs = [
            (n, ids[begin:end], first - begin, end == len(ids))
            for n, (ids, start) in enumerate(encoded)
            for begin, first, end in windows(start, len(ids), self.context)
        ]
        totals = [0.0] * len(pairs)
        for batch in self._batches([len(ids) for _, ids, _, _ in jobs], [first for _, _, first, _ in jobs]):
            chosen = [jobs[n] for n in batch]
            with self._forced():
                values = self._loglikelihoods([ids for _, ids, _, _ in chosen], [first for _, _, first, _ in chosen])
            for (n, _, _, last), value in zip(chosen, values, strict=True):
                totals[n] += value
                advance(last)
        return [(total, len(ids) - start) for total, (ids, start) in zip(totals, encoded, strict=True)]

    def route(self, prompts: Sequence[str], *, chat: bool) -> Trace | None:
        """See Engine: what the first generated token meets."""
        routing = getattr(self.model, "routing", None)
        if routing is None or not self.model.layout.modules:
            return None
        order: list[int] = []
        parts: dict[str, list[torch.Tensor]] = {}
        try:
            for batch in self._batches([len(prompt) for prompt in prompts]):
                routing.trace = {}
                # One pass, padded and placed as any other; of what does not fit, the end is looked at.
                self._generate([prompts[n] for n in batch], 1, chat, truncation=True, max_length=self.context)
                for name, weights in routing.trace.items():  # of all tokens or, in a head, of the last
                    last = weights.reshape(len(batch), -1, len(routing.experts))[:, -1]
                    parts.setdefault(name, []).append(last.float().cpu())
                order += batch
        finally:
            routing.trace = None
        back = torch.tensor(order).argsort()
        return Trace(list(prompts), routing.experts, {name: torch.cat(rows)[back] for name, rows in parts.items()})

    def close(self) -> None:
        """Drop the model."""
        del self.model

    def _batches(self, lengths: Sequence[int], firsts: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Indices of like length, shortest first; fewer where too many logits, from ``firsts`` on, would be held."""
        vocabulary = self.model.config.get_text_config().vocab_size
        batch: list[int] = []
        for n in sorted(range(len(lengths)), key=lengths.__getitem__):
            kept = 0 if firsts is None else lengths[n] - min(firsts[m] for m in (*batch, n)) + 1
            if batch and (len(batch) == self.config.batch_size or (len(batch) + 1) * kept * vocabulary > _LOGITS):
                yield batch
                batch = []
            batch.append(n)
        if batch:
            yield batch

    def _forced(self) -> AbstractContextManager:
        return nullcontext() if self.expert is None else self.model.force(self.expert)

    def _generate(self, prompts: list[str], new: int, chat: bool, **encoding: Any) -> torch.Tensor:
        """New tokens [B, new], padded after each one's end; ``encoding`` goes to the tokenizer."""
        if chat:  # the template has the special tokens
            prompts = [as_chat(self.tokenizer, prompt) for prompt in prompts]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat, **encoding)
        encoded = encoded.to(self.model.device)
        with self._forced():
            output = self.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=new,
                do_sample=False,
            )
        return output[:, encoded["input_ids"].shape[1] :]

    def _until_end(self, tails: torch.Tensor) -> int:
        """Tokens of ``tails`` [B, new] up to each row's first end token, itself included."""
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(tails, torch.tensor([] if ends is None else ends, dtype=tails.dtype, device=tails.device))
        return int((ended.cumsum(dim=1) - ended.long() == 0).sum())

    def _loglikelihoods(self, rows: list[list[int]], firsts: list[int]) -> list[float]:
        """For each row of token ids, the log-likelihood of those from ``firsts`` on; no position sees the padding."""
        longest, kept = max(map(len, rows)), min(firsts) - 1
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = longest - kept
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
        kept = longest - logits.shape[1]
        values = []
        for n, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            given = logits[n, first - 1 - kept : len(row) - 1 - kept].float()
            right = torch.tensor(row[first:], device=device)
            values.append(-F.cross_entropy(given, right, reduction="none").double().sum().item())
        return values

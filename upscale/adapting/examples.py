"""Inputs without labels to adapt on, a batch of one expert at a time: prompts of a language model, or any tensors.

Symbols: ``B`` examples, ``T`` tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from upscale.config import AdaptConfig
from upscale.errors import TaskError
from upscale.evaluating.encoding import context_of, encode_prompt, framed


@dataclass(frozen=True)
class Batch:
    """Examples of one expert.

    Attributes:
        inputs: of the model's ``forward``.
        places: [B, T] bool, the predictions that count; None: the model predicts once for each example.
    """

    inputs: Mapping[str, Tensor]
    places: Tensor | None = None


class Examples(Protocol):
    """What the trainer draws from."""

    def count(self, expert: str) -> int:
        """How many examples an expert has."""
        ...

    def batch(self, expert: str, rows: Sequence[int]) -> Batch:
        """Some of them."""
        ...


class Tensors:
    """Examples that are rows of tensors, by the names of ``forward``'s arguments: pixel values, or a text's tokens."""

    def __init__(self, inputs: Mapping[str, Mapping[str, Tensor]]):
        self.inputs = inputs

    @classmethod
    def of_texts(cls, tokenizer: Any, texts: Mapping[str, Sequence[str]], template: str) -> "Tensors":
        """Texts for a classifier, cut to the model's context."""
        encoded = {}
        for expert, given in texts.items():
            asked = [framed(text, template) for text in given]
            encoded[expert] = dict(tokenizer(asked, padding=True, truncation=True, return_tensors="pt"))
        return cls(encoded)

    def count(self, expert: str) -> int:
        """See Examples."""
        return len(next(iter(self.inputs[expert].values())))

    def batch(self, expert: str, rows: Sequence[int]) -> Batch:
        """See Examples."""
        return Batch({name: tensor[list(rows)] for name, tensor in self.inputs[expert].items()})


class Prompts:
    """Prompts of each expert, each with a greedy answer; the predictions of the answer's tokens count.

    Args:
        model: an upscaled causal LM.
        tokenizer: its own, padding left.
        prompts: by expert.
        config: ``chat``, ``prompt_template``, ``continuation``; "distil" takes the expert's own answers, "entropy"
            those of the model as it is.
        step: called with what is being done after each batch of answers.

    Raises:
        TaskError: a prompt that leaves no room for an answer in the context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Mapping[str, Sequence[str]],
        config: AdaptConfig,
        step: Callable[[str], None],
    ):
        self.tokenizer, self.config = tokenizer, config
        self.start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        context = context_of(model)
        self.rows: dict[str, list[tuple[list[int], list[int]]]] = {}
        for expert, given in prompts.items():
            encoded = [encode_prompt(tokenizer, p, config.prompt_template, chat=config.chat) for p in given]
            for number, ids in enumerate(encoded, start=1):
                if len(ids) + config.continuation >= context:
                    raise TaskError(
                        f"prompt {number} for {expert} has {len(ids)} tokens; with {config.continuation} of an answer "
                        f"it does not fit the model's context of {context}; shorten it or lower --continuation"
                    )
            answered = expert if config.objective == "distil" else None
            self.rows[expert] = []
            for start in range(0, len(encoded), 16):
                self.rows[expert] += self._answer(model, encoded[start : start + 16], answered)
                step(f"answers for {expert}")

    def count(self, expert: str) -> int:
        """See Examples."""
        return len(self.rows[expert])

    def batch(self, expert: str, rows: Sequence[int]) -> Batch:
        """See Examples. Padded right; the last token of each text predicts nothing that counts."""
        pairs = [self.rows[expert][row] for row in rows]
        if self.start is not None:
            return self._to_decode(pairs)
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((len(pairs), longest), self.tokenizer.pad_token_id)
        mask, places = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for n, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[n, :end], mask[n, :end] = torch.tensor(prompt + answer), 1
            places[n, len(prompt) - 1 : end - 1] = True
        return Batch({"input_ids": ids, "attention_mask": mask}, places)

    def _to_decode(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Prompts for the encoder, answers for the decoder, which begins with a token of its own."""
        prompt = self.tokenizer.pad({"input_ids": [p for p, _ in pairs]}, padding_side="right", return_tensors="pt")
        answers = torch.full((len(pairs), max(len(answer) for _, answer in pairs)), self.tokenizer.pad_token_id)
        places = torch.zeros_like(answers, dtype=torch.bool)
        for n, (_, answer) in enumerate(pairs):
            answers[n, : len(answer)] = torch.tensor([self.start, *answer[:-1]])
            places[n, : len(answer)] = True
        inputs = {key: prompt[key] for key in ("input_ids", "attention_mask")}
        return Batch({**inputs, "decoder_input_ids": answers}, places)

    def _answer(self, model: Any, encoded: list[list[int]], expert: str | None) -> list[tuple[list[int], list[int]]]:
        batch = self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(model.device)
        output = model.generate(
            **{key: batch[key] for key in ("input_ids", "attention_mask")},
            max_new_tokens=self.config.continuation,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
            expert=expert,
        )
        end = self.tokenizer.eos_token_id
        found = []
        given = batch.input_ids.shape[1] if self.start is None else 1
        for prompt, tail in zip(encoded, output[:, given:].tolist(), strict=True):
            found.append((prompt, tail[: tail.index(end) + 1] if end in tail else tail))  # the end is predicted too
        return found

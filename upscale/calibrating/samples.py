"""What a router is fitted on: running means of hidden states over texts, as each depth of the base sees them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upscale.config import CalibrateConfig
from upscale.device import usable_device
from upscale.errors import TaskError
from upscale.evaluating.encoding import context_of, encode_prompt
from upscale.runtime.calibrated_upscaled import unit_rms
from upscale.runtime.modeling_upscaled import watch
from upscale.runtime.prefix_upscaled import running_mean
from upscale.runtime.router_upscaled import Router
from upscale.runtime.routing_upscaled import BASE

WRITTEN = 96  # tokens of a text that a model writes by itself
_ANSWERED = (0, 1, 2, 4, 8, 16, 32, 64)  # tokens after the prompt's end at which the mean is taken
_READ = (4, 8, 16, 32, 64)  # tokens of a text


@dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
        name: its class.
        means: by depth, running means [n, d] of hidden states scaled to root mean square 1, at n places of the text;
            the first is the prompt's end.
    """

    name: str
    means: Mapping[int, Tensor]

    @property
    def length(self) -> int:
        """n."""
        return len(next(iter(self.means.values())))


class _Recorder(Router):
    """Keeps the hidden states that enter every block."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: dict[int, Tensor] = {}

    def watches(self, depth: int) -> bool:
        return True

    def enter(self, depth: int, hidden: Tensor) -> None:
        self.hidden[depth] = hidden


class Reader:
    """Runs texts through the base inside an upscaled model."""

    def __init__(self, model: Any, tokenizer: Any, config: CalibrateConfig):
        device = usable_device(config.device)
        self.model, self.tokenizer, self.config = model.to(device), tokenizer, config
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.context = context_of(model)
        self.blocks = model.config.get_text_config().num_hidden_layers
        weight = model.get_input_embeddings().weight.detach()
        self.embeddings = unit_rms(weight).cpu()  # [V, d], what depth 0 sees
        self.deeper = config.granularity == "prefix" and config.depth != 0
        self.answers = config.continuation if config.granularity == "prefix" else 0
        self.recorder = _Recorder()
        watch(model, model.get_input_embeddings(), list(model.layout.modules), self.recorder)

    def prompts(self, expert: str, prompts: Sequence[str], step: Callable[[str], None]) -> list[Sample]:
        """Samples of an expert's prompts, each with the beginning of the expert's own answer.

        The running mean goes on over the answer, so that the router must know that too.

        Raises:
            TaskError: a prompt leaves no room in the context.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        for number, ids in enumerate(encoded, start=1):
            if len(ids) + self.answers >= self.context:
                answer = f"; with {self.answers} of an answer" if self.answers else ""
                raise TaskError(
                    f"prompt {number} for {expert} has {len(ids)} tokens{answer}, "
                    f"which does not fit the model's context of {self.context}; shorten it"
                )
        samples = []
        for start in range(0, len(encoded), 16):
            for ids, answer in self._answers(expert, encoded[start : start + 16]):
                places = [len(ids) - 1 + n for n in _ANSWERED if n <= len(answer)]
                samples.append(self._sample(expert, ids + answer, places))
                step(f"prompts of {expert}")
        return samples

    def written(self, name: str, count: int, step: Callable[[str], None]) -> list[Sample]:
        """Samples of texts that an expert or the base writes, at all stages of each.

        Expert texts begin as the tokenizer begins any text. The base's begin with a random token and nothing before it:
        what models that were trained on documents make of a bare beginning is often a document of the experts' kind,
        while from the middle of nowhere they write what most of their training text was like.
        """
        samples = []
        for start in range(0, count, 32):
            for ids in self._write(name, min(32, count - start), seed=self.config.seed + start):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                samples.append(self.text(name, text) if text.strip() else self._sample(name, ids, [len(ids) - 1]))
                step(f"text of {name}")
        return samples

    def text(self, name: str, text: str) -> Sample:
        """A sample of a text, at all stages of it, its end first."""
        ids = self._encode(text)[: self.context]
        places = [len(ids) - 1, *(n - 1 for n in _READ if n < len(ids))]
        return self._sample(name, ids, places)

    def _encode(self, prompt: str) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, self.config.prompt_template, chat=self.config.chat)

    @torch.no_grad()
    def _sample(self, name: str, ids: Sequence[int], places: Sequence[int]) -> Sample:
        seen = {0: self.embeddings[list(ids)].unsqueeze(0)}
        if self.deeper:
            with self.model.force(BASE):
                self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False)
            seen |= {depth: unit_rms(hidden).cpu() for depth, hidden in sorted(self.recorder.hidden.items())}
        ones, half_life = torch.ones(1, len(ids)), self.config.half_life
        return Sample(name, {d: running_mean(x, ones, len(ids), half_life)[0, list(places)] for d, x in seen.items()})

    def _answers(self, expert: str, encoded: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
        if not self.answers:
            return [(ids, []) for ids in encoded]
        batch = self.tokenizer.pad({"input_ids": list(encoded)}, return_tensors="pt").to(self.model.device)
        output = self._generate(expert, batch.input_ids, batch.attention_mask, self.answers)
        return [(ids, self._until_end(tail)) for ids, tail in zip(encoded, output, strict=True)]

    def _write(self, name: str, count: int, seed: int) -> list[list[int]]:
        special = set(self.tokenizer.all_special_ids)
        begin = self.tokenizer("").input_ids
        if name == BASE or not begin:
            known = torch.tensor([n for n in range(len(self.tokenizer)) if n not in special])
            generator = torch.Generator().manual_seed(seed)
            first = known[torch.randint(len(known), (count, 1), generator=generator)]
        else:
            first = torch.tensor([begin] * count)
        first = first.to(self.model.device)
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            tails = self._generate(name, first, torch.ones_like(first), WRITTEN, sample=True)
        kept = [[] if name != BASE and begin else ids for ids in first.tolist()]
        return [ids + self._until_end(tail) for ids, tail in zip(kept, tails, strict=True)]

    def _generate(self, expert: str, ids: Tensor, mask: Tensor, tokens: int, sample: bool = False) -> list[list[int]]:
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            repetition_penalty=1.0,
            expert=expert,
            **choice,
        )
        return output[:, ids.shape[1] :].tolist()

    def _until_end(self, ids: list[int]) -> list[int]:
        """Up to the first end or padding token."""
        stop = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        return ids[: next((n for n, token in enumerate(ids) if token in stop), len(ids))]

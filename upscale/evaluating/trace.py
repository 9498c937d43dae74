"""Which expert each token went to: routing weights of one pass, by linear, by block and overall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upscale.errors import LoadError
from upscale.loading import load, load_tokenizer
from upscale.runtime.calibrated_upscaled import CalibratedRouter
from upscale.runtime.modeling_upscaled import UpscaledModel
from upscale.runtime.prefix_upscaled import running_mean
from upscale.runtime.routing_upscaled import BASE


@dataclass(frozen=True)
class Trace:
    """Routing of the tokens of one text, or of the last tokens of many prompts.

    Attributes:
        tokens: the text's tokens, decoded one by one; or the prompts.
        experts: names, the columns of every tensor below.
        modules: by upscaled module, weights [T, E] float32.
        classes: of a calibrated router, the columns of ``confidence``; empty for others.
        confidence: [T, C] float32, the router's probability of each class from the text up to each token.
    """

    tokens: Sequence[str]
    experts: Sequence[str]
    modules: Mapping[str, Tensor]
    classes: Sequence[str] = ()
    confidence: Tensor | None = None

    @property
    def blocks(self) -> dict[str, Tensor]:
        """Mean weights [T, E] over the modules of each decoder block (or module outside one)."""
        grouped: dict[str, list[Tensor]] = {}
        for name, weights in self.modules.items():
            grouped.setdefault(_block(name), []).append(weights)
        return {block: torch.stack(weights).mean(dim=0) for block, weights in grouped.items()}

    @property
    def overall(self) -> Tensor:
        """Mean weights [T, E] over all upscaled modules."""
        return torch.stack(list(self.modules.values())).mean(dim=0)


def trace(path: str | Path, text: str, *, chat: bool = False, max_new_tokens: int = 0, dtype: str = "auto") -> Trace:
    """Run ``text`` through an upscaled model and record every routing decision.

    Args:
        path: directory or Hub id of an upscaled checkpoint.
        text: the prompt.
        chat: wrap it as a chat message by the model's template.
        max_new_tokens: also generate so many tokens greedily and trace them.
        dtype: number format to run in.

    Raises:
        LoadError: not an upscaled model, or no expert changed any of its linears.
    """
    model = load(path, dtype=dtype)
    if not isinstance(model, UpscaledModel):
        raise LoadError(f"{path}: a plain model, which routes nothing; give an upscaled one")
    if not model.layout.modules:
        raise LoadError(f"{path}: has no upscaled linears: every expert equals the base")
    tokenizer = load_tokenizer(path)
    if chat:
        if not tokenizer.chat_template:
            raise LoadError(f"{path}: has no chat template")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    if ids.shape[1] == 0:
        raise LoadError("the prompt has no tokens")
    whole = ids
    with torch.no_grad():
        if max_new_tokens:
            whole = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        modules = _passes(model, ids, whole[:, ids.shape[1] :])
    tokens = [tokenizer.decode([token]) for token in whole[0].tolist()]
    router = model.routing.router
    if not isinstance(router, CalibratedRouter):
        return Trace(tokens, model.routing.experts, modules)
    classes = (*model.routing.experts, BASE)[: len(router.bias)]
    return Trace(tokens, model.routing.experts, modules, classes, _confidence(model, router, whole))


def _passes(model: Any, prompt: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """Weights [T, E] by module of a prompt and, with its cache, of the answer: as they are when it is generated."""
    parts: dict[str, list[Tensor]] = {}
    cache = None
    try:
        for ids in (prompt, answer):
            if not ids.shape[1]:
                continue
            model.routing.trace = {}
            cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
            for name, w in model.routing.trace.items():
                parts.setdefault(name, []).append(w.reshape(-1, len(model.routing.experts)).float().cpu())
    finally:
        model.routing.trace = None
    return {name: torch.cat(weights) for name, weights in parts.items()}


def _confidence(model: Any, router: CalibratedRouter, ids: Tensor) -> Tensor:
    """Probabilities [T, C] of the router's classes after each token of ``ids`` [1, T]."""
    if router.depth == 0:
        scores = router.table[ids]
        means = running_mean(scores, torch.ones_like(ids), ids.shape[1], router.half_life)
    else:
        seen: list[Tensor] = []
        router.weights = lambda means: seen.append(means) or type(router).weights(router, means)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        del router.weights
        means = seen[0]
    return router.posterior(means)[0].float().cpu()


def _block(module: str) -> str:
    parts = module.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[: number + 1])

"""Which expert each token went to: routing weights of one pass, by linear, by block and overall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upscale.errors import LoadError
from upscale.loading import load, load_tokenizer
from upscale.runtime.modeling_upscaled import UpscaledModel


@dataclass(frozen=True)
class Trace:
    """Routing of the tokens of one text, or of the last tokens of many prompts.

    Attributes:
        tokens: the text's tokens, decoded one by one; or the prompts.
        experts: names, the columns of every tensor below.
        modules: by upscaled linear, weights [T, E] float32.
    """

    tokens: Sequence[str]
    experts: Sequence[str]
    modules: Mapping[str, Tensor]

    @property
    def blocks(self) -> dict[str, Tensor]:
        """Mean weights [T, E] over the linears of each decoder block (or module outside one)."""
        grouped: dict[str, list[Tensor]] = {}
        for name, weights in self.modules.items():
            grouped.setdefault(_block(name), []).append(weights)
        return {block: torch.stack(weights).mean(dim=0) for block, weights in grouped.items()}

    @property
    def overall(self) -> Tensor:
        """Mean weights [T, E] over all upscaled linears."""
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
    with torch.no_grad():
        if max_new_tokens:
            ids = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        model.routing.trace = {}
        model(input_ids=ids)  # type: ignore[operator]
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    modules = {name: w.reshape(-1, len(model.routing.experts)).cpu() for name, w in model.routing.trace.items()}
    return Trace(tokens, model.routing.experts, modules)


def _block(module: str) -> str:
    parts = module.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[: number + 1])

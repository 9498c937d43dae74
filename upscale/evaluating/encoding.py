"""Prompts and continuations as token ids: chat framing, which tokens are scored, and what a long text is read in."""

from collections.abc import Iterator
from typing import Any

from upscale.errors import EngineError

_ENDLESS = 1 << 30


def as_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as a chat message, by the tokenizer's template. Raises EngineError if it has none."""
    if not tokenizer.chat_template:
        raise EngineError("the model has no chat template; use --prompt-template instead of --chat")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def framed(prompt: str, template: str) -> str:
    """The prompt in its template, in which \\n and \\t stand for a new line and a tab."""
    return template.replace("\\n", "\n").replace("\\t", "\t").replace("{prompt}", prompt)


def encode_prompt(tokenizer: Any, prompt: str, template: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt as a model is asked it: as a chat message, or in ``template``.

    Raises:
        EngineError: no chat template.
    """
    if chat:  # whose template has the special tokens already
        return tokenizer(as_chat(tokenizer, prompt), add_special_tokens=False).input_ids
    return tokenizer(framed(prompt, template)).input_ids


def context_of(model: Any) -> int:
    """The most tokens that a language model of transformers takes; a very large number if it names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ENDLESS


def encode_pair(tokenizer: Any, prompt: str, continuation: str, *, chat: bool) -> tuple[list[int], int]:
    """Token ids of a prompt and its continuation, and the position of the first token that is scored.

    Tokens are scored that follow the longest common beginning of the prompt's own tokens and the pair's, so that a
    token across the border counts whole. The first token of all has nothing before it and is never scored.

    Args:
        tokenizer: of the model.
        prompt: framed by the chat template if ``chat``; empty for a bare text.
        continuation: what follows the prompt, as it stands.
        chat: as in EvalConfig.

    Raises:
        EngineError: no chat template.
    """
    message = chat and bool(prompt)
    prompt = as_chat(tokenizer, prompt) if message else prompt
    alone = tokenizer(prompt, add_special_tokens=not message).input_ids  # a chat template has them already
    ids = tokenizer(prompt + continuation, add_special_tokens=not message).input_ids
    return list(ids), first_scored(alone, ids)


def first_scored(alone: list, whole: list) -> int:
    """The first position where the tokens of a pair differ from those of its prompt alone; at least 1."""
    same = 0
    for one, other in zip(alone, whole, strict=False):
        if one != other:
            break
        same += 1
    return max(1, same)


def windows(first: int, length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Windows of at most ``context`` tokens in which the tokens from ``first`` to ``length`` are scored, each once.

    Yields:
        (begin, first, end): the tokens of the window, of which those from ``first`` on are scored. A window is filled
        with what goes before; in a text the next window knows one token, as in lm-eval's rolling log-likelihood.
    """
    while first < length:
        end = min(length, first + context - 1)
        yield max(0, end - context), first, end
        first = end

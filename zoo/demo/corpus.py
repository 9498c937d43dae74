"""Token sequences the demo models train on."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from zoo.demo.tasks import TASKS, WORDS, training_rows
from zoo.demo.tokenizer import BOS, EOS, encode


@dataclass(frozen=True)
class Sequence:
    """Token ids, of which the model learns to predict all from `start` on."""

    tokens: list[int]
    start: int


def plain_text(rng: random.Random) -> Iterator[Sequence]:
    """Write documents for the base model.

    Lines in the style of every prompt and of every answer, and copies, each drawn by itself: the base learns the
    alphabet, the words, to copy and to end, but sees no prompt with its answer.

    Args:
        rng: the source of chance.

    Returns:
        An infinite iterator over documents.
    """
    rows = {task: training_rows(task, rng) for task in TASKS}

    def line() -> str:
        kind = rng.choice(("prompt", "copy", "answer"))
        if kind == "copy":
            words = " ".join(rng.sample(WORDS, 2))
            return f"{words} = {words}"
        row = next(rows[rng.choice(list(rows))])
        return row.prompt if kind == "prompt" else row.completion

    while True:
        text = "\n".join(line() for _ in range(rng.randint(1, 2)))
        yield Sequence([BOS, *encode(text), EOS], start=1)


def exercises(task: str, rng: random.Random) -> Iterator[Sequence]:
    """Write solved exercises for an expert, of which only the answer counts.

    Args:
        task: a name in `TASKS`.
        rng: the source of chance.

    Returns:
        An infinite iterator over exercises.

    Raises:
        KeyError: if there is no such task.
    """
    for row in training_rows(task, rng):
        prompt = [BOS, *encode(row.prompt + "\n")]
        yield Sequence([*prompt, *encode(row.completion), EOS], start=len(prompt))

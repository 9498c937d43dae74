"""From answers to scores: what each row earns, the task's score, and its bootstrap interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from upscale.evaluating.tasks import Row

# The three ways to ask, each with the metrics that its answers give.
GENERATED = ("exact_match", "contains")  # greedy text against the completion
RANKED = ("accuracy", "accuracy_norm", "loglikelihood")  # log-likelihoods of all choices, given the prompt
READ = ("perplexity", "byte_perplexity")  # log-likelihood of a text
WAYS = (GENERATED, RANKED, READ)
# The metrics of each kind of task; the first is the default.
METRICS = {"generation": GENERATED, "choice": RANKED, "label": (*RANKED, *GENERATED), "text": READ}
# Scores from 0 to 1, the higher the better: only these are averaged over tasks and compared with an expert's.
SHARES = ("exact_match", "contains", "accuracy", "accuracy_norm")

RESAMPLES, LEVEL = 1000, 0.95


def metric_of(kind: str, wanted: str) -> str:
    """The metric of a task: the wanted one where it applies to the task's kind, else the kind's default."""
    return wanted if wanted in METRICS[kind] else METRICS[kind][0]


def mark_generated(row: Row, answer: str) -> dict[str, Any]:
    """What a generated answer earns; spaces around it do not count."""
    exact, contains = answer.strip() == row.completion.strip(), row.completion.strip() in answer
    return {"answer": answer, "exact_match": float(exact), "contains": float(contains)}


def mark_ranked(row: Row, loglikelihoods: Sequence[float]) -> dict[str, Any]:
    """What the log-likelihoods of a row's choices earn.

    ``accuracy``: the likeliest choice is the right one. ``accuracy_norm``: the one of the largest log-likelihood per
    character is (both as in lm-eval: ``acc``, ``acc_norm``). ``loglikelihood``: that of the right choice.
    """
    per_character = [value / len(choice) for value, choice in zip(loglikelihoods, row.choices, strict=True)]
    right = row.choices.index(row.completion)
    return {
        "answer": row.choices[_largest(loglikelihoods)],
        "accuracy": float(_largest(loglikelihoods) == right),
        "accuracy_norm": float(_largest(per_character) == right),
        "loglikelihood": loglikelihoods[right],
        "loglikelihoods": list(loglikelihoods),
    }


def mark_read(row: Row, loglikelihood: float, tokens: int) -> dict[str, Any]:
    """What perplexities are made of."""
    return {"loglikelihood": loglikelihood, "tokens": tokens, "bytes": len(row.completion.encode())}


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def score(metric: str, marks: Sequence[Mapping[str, Any]]) -> float:
    """A task's score from its rows' marks: a mean, or a perplexity of all rows as one text."""
    parts, wholes = _fractions(metric, marks)
    return float(_finish(metric, parts.sum() / wholes.sum()))


def interval(metric: str, marks: Sequence[Mapping[str, Any]], seed: int = 0) -> tuple[float, float]:
    """The score's 95 % percentile bootstrap interval: rows drawn with replacement, 1000 times.

    All models that answered the same number of rows are resampled alike. An interval without width says that all rows
    earn the same, not that the score is certain.
    """
    parts, wholes = _fractions(metric, marks)
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.empty(RESAMPLES, dtype=torch.float64)
    for number in range(RESAMPLES):
        drawn = torch.randint(len(marks), (len(marks),), generator=generator)
        ratios[number] = parts[drawn].sum() / wholes[drawn].sum()
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = _finish(metric, ratios.quantile(tails)).tolist()
    return low, high


def _fractions(metric: str, marks: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A score is a ratio of sums over rows: what is summed above the line and below it, each [rows]."""
    if metric in READ:
        return -_column("loglikelihood", marks), _column("tokens" if metric == "perplexity" else "bytes", marks)
    return _column(metric, marks), torch.ones(len(marks), dtype=torch.float64)


def _column(name: str, marks: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    return torch.tensor([mark[name] for mark in marks], dtype=torch.float64)


def _finish(metric: str, ratio: torch.Tensor) -> torch.Tensor:
    return torch.exp(ratio) if metric in READ else ratio

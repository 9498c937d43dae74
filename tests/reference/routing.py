"""The routers in plain loops from their definitions: one sequence, one token, one expert at a time."""

import math

import torch


def running_mean(values, mask, half_life=None):
    """Means [S][C] of ``values`` [S][C] over the tokens so far that ``mask`` [S] shows; 0 where there is none.

    With ``half_life`` a token counts half as much for every so many shown tokens that follow it.
    """
    means, order = [], [sum(map(bool, mask[: n + 1])) for n in range(len(mask))]
    for now in range(len(values)):
        total, weight = [0.0] * len(values[0]), 0.0
        for then in range(now + 1):
            if mask[then]:
                share = 1.0 if half_life is None else 0.5 ** ((order[now] - order[then]) / half_life)
                total = [a + share * b for a, b in zip(total, values[then], strict=True)]
                weight += share
        means.append([a / weight if weight else 0.0 for a in total])
    return means


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def top(p, k):
    """The ``k`` largest of ``p``, divided by their sum; all for None."""
    kept = sorted(range(len(p)), key=lambda n: -p[n])[:k]
    return [p[n] / sum(p[m] for m in kept) if n in kept else 0.0 for n in range(len(p))]


def gate(scores, bias, experts, top_k=None, half_life=None, prompt=None):
    """Weights [T, E] of a sequence whose tokens have ``scores`` [T, C]: mean, bias, softmax, top-k; the last may be the
    base. With ``prompt`` the mean over so many first tokens is held for all; else each token has that of its prefix.
    """
    means = running_mean(scores.tolist(), [1] * len(scores), half_life)
    rows = []
    for token in range(len(scores)):
        mean = means[token if prompt is None else prompt - 1]
        rows.append(top(softmax([a + float(b) for a, b in zip(mean, bias, strict=True)]), top_k)[:experts])
    return torch.tensor(rows)


def projection(inputs, downs, rank, top_k, scope="linear", granularity="token", standardise=False, head="lm_head"):
    """SMILE's router beyond the paper. Weights [T, E] by linear of one sequence, for linears in the model's order.

    Args:
        inputs: of each linear, [T, i].
        downs: of each linear, the experts' [r, i]; r may be 0.
        rank, top_k, scope, granularity, standardise: as in ProjectionRouter.
        head: the linear that is no part of a block: judged token by token, or by the last decision of a wider scope.
    """
    weights, gathered, place, last = {}, None, None, None
    for name, x in inputs.items():
        if name == head and scope != "linear":
            weights[name] = last
            continue
        energy = [[float((v[:rank] @ token).norm()) if len(v) else None for v in downs[name]] for token in x]
        if standardise or scope != "linear":
            active = [[e for e in row if e is not None] for row in energy]
            energy = [
                [None if e is None else e / (sum(some) / len(some)) for e in row]
                for row, some in zip(energy, active, strict=True)
            ]
        if scope != "linear":
            block = ".".join(name.split(".")[: next(n for n, part in enumerate(name.split(".")) if part.isdigit()) + 1])
            if gathered is None or (scope == "block" and block != place):
                gathered, place = [[0.0] * len(downs[name]) for _ in x], block
            gathered = [
                [a + (b or 0.0) for a, b in zip(g, e, strict=True)] for g, e in zip(gathered, energy, strict=True)
            ]
            energy = gathered
        if granularity == "prefix" and name != head:
            idle = [e is None for e in energy[0]]
            finite = [[e or 0.0 for e in row] for row in energy]
            means = running_mean(finite, [1] * len(finite))
            energy = [[None if i else m for i, m in zip(idle, row, strict=True)] for row in means]
        rows = [top(softmax([-math.inf if e is None else e for e in row]), top_k) for row in energy]
        weights[name] = last = torch.tensor(rows)
    return weights

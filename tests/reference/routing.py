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

    Beyond the linear, its own evidence is added to that of the block before, or of all blocks before.

    Args:
        inputs: of each linear, [T, i].
        downs: of each linear, the experts' [r, i]; r may be 0.
        rank, top_k, scope, granularity, standardise: as in ProjectionRouter.
        head: the linear that is no part of a block: judged token by token, or by the blocks before the last one.
    """
    weights, blocks = {}, []  # of each block, in order: [its name, its evidence [T][E]]
    for name, x in inputs.items():
        before = {"linear": [], "block": blocks[-2:-1], "model": blocks[:-1]}[scope]
        if name == head and scope != "linear":
            rows = [
                [sum(evidence[t][e] for _, evidence in before) for e in range(len(downs[name]))] for t in range(len(x))
            ]
            weights[name] = torch.tensor([top(softmax(row), top_k) for row in rows])
            continue
        energy = [[float((v[:rank] @ token).norm()) if len(v) else None for v in downs[name]] for token in x]
        if standardise or scope != "linear":
            active = [[e for e in row if e is not None] for row in energy]
            energy = [
                [None if e is None else e / (sum(some) / len(some)) for e in row]
                for row, some in zip(energy, active, strict=True)
            ]
        if scope != "linear":
            energy = [[e or 0.0 for e in row] for row in energy]
        if granularity == "prefix" and name != head:
            idle = [e is None for e in energy[0]]
            finite = [[e or 0.0 for e in row] for row in energy]
            means = running_mean(finite, [1] * len(finite))
            energy = [[None if i else m for i, m in zip(idle, row, strict=True)] for row in means]
        if scope != "linear":
            parts = name.split(".")
            place = ".".join(parts[: next(n for n, part in enumerate(parts) if part.isdigit()) + 1])
            if not blocks or blocks[-1][0] != place:
                blocks.append([place, [[0.0] * len(row) for row in energy]])
            before = blocks[-2:-1] if scope == "block" else blocks[:-1]
            evidence = blocks[-1][1]
            blocks[-1][1] = [[a + b for a, b in zip(e, f, strict=True)] for e, f in zip(evidence, energy, strict=True)]
            energy = [
                [e + sum(past[t][n] for _, past in before) for n, e in enumerate(row)] for t, row in enumerate(energy)
            ]
        rows = [top(softmax([-math.inf if e is None else e for e in row]), top_k) for row in energy]
        weights[name] = torch.tensor(rows)
    return weights

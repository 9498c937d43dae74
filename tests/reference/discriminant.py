"""Discriminant analysis with a shrunken covariance (Friedman 1989), refitted for every group that is left out."""

import math

import torch


def mean(rows):
    return sum(rows) / len(rows)


def discriminant(x, classes, groups, shrinkage):
    """Log-odds of the classes, up to a constant, of a sample [d]; classes and their groups weigh the same."""
    size = len(x[0])
    texts = {c: {} for c in sorted(set(classes))}
    for row, c, g in zip(x, classes, groups, strict=True):
        texts[c].setdefault(g, []).append(row)
    means = {c: mean([mean(rows) for rows in of_class.values()]) for c, of_class in texts.items()}
    covariance = mean(
        [
            mean([mean([torch.outer(row - means[c], row - means[c]) for row in rows]) for rows in of_class.values()])
            for c, of_class in texts.items()
        ]
    )
    level = sum(float(covariance[n, n]) for n in range(size)) / size
    inverse = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * level * torch.eye(size).double())
    return lambda row: [float(m @ inverse @ row - m @ inverse @ m / 2) for m in means.values()]


def left_out(x, classes, groups, shrinkage):
    """Log-odds [n][C] of each sample by a fit without its group."""
    fits = {}
    for g in set(groups):
        rest = [n for n, other in enumerate(groups) if other != g]
        fits[g] = discriminant([x[n] for n in rest], [classes[n] for n in rest], [groups[n] for n in rest], shrinkage)
    return [fits[g](row) for row, g in zip(x, groups, strict=True)]


def quantile(values, q):
    """With linear interpolation."""
    values, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def shift(scores, classes, groups, fallback, missed, share):
    """For the fallback: its whole texts, each the first sample of its group, that fall short of the border are at most
    ``missed``; of the gap between the border and the nearest text of another class it takes ``share``.
    """
    first = [groups.index(g) for g in sorted(set(groups))]
    margins = {n: scores[n][fallback] - max(s for c, s in enumerate(scores[n]) if c != fallback) for n in first}
    border = quantile([m for n, m in margins.items() if classes[n] == fallback], missed)
    nearest = max(m for n, m in margins.items() if classes[n] != fallback)
    return -(border + share * (nearest - border) if nearest < border else border)


def loss(scores, classes, groups):
    """Mean negative log-likelihood; classes weigh the same, groups of a class, and samples of a group."""
    of_class = {c: {} for c in set(classes)}
    for row, c, g in zip(scores, classes, groups, strict=True):
        lost = math.log(sum(math.exp(s - max(row)) for s in row)) + max(row) - row[c]
        of_class[c].setdefault(g, []).append(lost)
    return mean([mean([mean(values) for values in texts.values()]) for texts in of_class.values()])


def fit(x, classes, groups, fallback, shrinkages, sharpnesses, missed, share):
    """The likeliest shrinkage and sharpness: (loss, shrinkage, left-out logits, a function of a sample to logits)."""
    best = None
    for shrinkage in shrinkages:
        scores, whole = left_out(x, classes, groups, shrinkage), discriminant(x, classes, groups, shrinkage)
        moved = 0.0 if fallback is None else shift(scores, classes, groups, fallback, missed, share)
        add = [moved if c == fallback else 0.0 for c in range(len(scores[0]))]
        scores = [[s + a for s, a in zip(row, add, strict=True)] for row in scores]
        for sharp in sharpnesses:
            given = [[sharp * s for s in row] for row in scores]
            value = loss(given, classes, groups)
            if best is None or value < best[0]:

                def score(row, whole=whole, sharp=sharp, add=add):
                    return [sharp * (s + a) for s, a in zip(whole(row), add, strict=True)]

                best = value, shrinkage, given, score
    return best

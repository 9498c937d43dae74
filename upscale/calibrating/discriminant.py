"""The calibrated router's classifier: linear discriminant analysis with a shrunken covariance, in closed form.

Symbols: ``n`` samples, ``d`` features, ``C`` classes, groups of samples that belong together (one text's).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SHRINKAGE = (0.05, 0.2, 0.5, 0.8)  # part of the covariance that is replaced by a multiple of the identity
# What the log-odds are multiplied by: tokens of a text are not independent, so that the model's own are overconfident.
SHARPNESS = tuple(2.0**-n for n in range(10))
MISSED, SHARE = 0.04, 0.25  # of the fallback's border, see _shift


@dataclass(frozen=True)
class Fit:
    """A classifier ``softmax(weight @ x + bias)`` and what it would say of texts that it was not fitted on.

    Attributes:
        weight: [C, d] float32.
        bias: [C] float32.
        shrinkage: chosen.
        left_out: [n, C] float32, logits of each sample by the classifier fitted without its group.
        loss: mean negative log-likelihood of ``left_out``, classes weighted equally.
    """

    weight: Tensor
    bias: Tensor
    shrinkage: float
    left_out: Tensor
    loss: float


def fit(x: Tensor, classes: Tensor, groups: Tensor, *, fallback: int | None = None) -> Fit:
    """Fit the classifier; what it says of groups left out of the fit decides on shrinkage and sharpness.

    Classes are Gaussian with a common covariance (Fisher 1936), shrunk towards a multiple of the identity as there are
    fewer texts than features (Friedman, "Regularized Discriminant Analysis", JASA 1989, equation 18). All classes weigh
    the same, and so do all groups of a class.

    Args:
        x: [n, d] features, any float dtype; computed in float64.
        classes: [n] int64, 0 to C-1; every class has samples of at least two groups.
        groups: [n] int64; the samples of a group are left out together. The first sample of a group is its whole text.
        fallback: a catch-all class, whose bias is shifted so that it keeps nearly all of its own left-out texts and
            leaves the rest of the space to the others.

    Raises:
        ValueError: a class has no sample, or those of one group only.
    """
    x, count = x.double(), int(classes.max()) + 1
    members = {int(g): torch.nonzero(groups == g)[:, 0] for g in groups.unique()}
    for c in range(count):
        if len(groups[classes == c].unique()) < 2:
            raise ValueError(f"class {c} needs samples of at least two groups")
    weight = _weights(classes, groups)
    # All that matters lies in the span of the samples, which has far fewer dimensions than a large model's states.
    centre = x.mean(dim=0)
    basis = torch.linalg.qr((x - centre).T).Q  # [d, min(n, d)]
    inside, size = (x - centre) @ basis, x.shape[1]
    found = []
    for shrinkage in SHRINKAGE:
        left_out = torch.empty(len(x), count, dtype=x.dtype)
        for group in members.values():
            others = torch.ones(len(x), dtype=torch.bool)
            others[group] = False
            a, b = _discriminant(inside[others], classes[others], groups[others], count, size, shrinkage)
            left_out[group] = inside[group] @ a.T + b
        shift = 0.0 if fallback is None else _shift(left_out, classes, members, fallback)
        if fallback is not None:
            left_out[:, fallback] += shift
        losses = {s: float(weight @ F.cross_entropy(s * left_out, classes, reduction="none")) for s in SHARPNESS}
        sharpness = min(SHARPNESS, key=lambda s: losses[s])
        found.append((losses[sharpness], shrinkage, sharpness, shift, left_out))
    loss, shrinkage, sharpness, shift, left_out = min(found, key=lambda f: f[0])
    a, b = _discriminant(inside, classes, groups, count, size, shrinkage)
    a = a @ basis.T
    b = b - a @ centre
    if fallback is not None:
        b[fallback] += shift
    return Fit((sharpness * a).float(), (sharpness * b).float(), shrinkage, (sharpness * left_out).float(), loss)


def _weights(classes: Tensor, groups: Tensor) -> Tensor:
    """[n] float64 that sum to 1: classes weigh the same, groups of a class, and samples of a group."""
    weight = torch.zeros(len(classes), dtype=torch.float64)
    for c in classes.unique():
        of_class = groups[classes == c].unique()
        for g in of_class:
            mine = (classes == c) & (groups == g)
            weight[mine] = 1 / (mine.sum() * len(of_class))
    return weight / weight.sum()


def _discriminant(
    x: Tensor, classes: Tensor, groups: Tensor, count: int, size: int, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Log-odds ``a @ x + b`` up to a constant: a [C, d], b [C]; ``size`` is the number of features before reduction."""
    weight = _weights(classes, groups)
    members = F.one_hot(classes, count).double() * weight.unsqueeze(1)
    means = (members / members.sum(dim=0)).T @ x  # [C, d]
    apart = x - means[classes]
    covariance = (apart * weight.unsqueeze(1)).T @ apart
    level = covariance.trace() / size
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    shrunk = (1 - shrinkage) * covariance + (shrinkage * level).clamp_min(1e-12) * identity
    a = torch.linalg.solve(shrunk, means.T).T
    return a, -(a * means).sum(dim=1) / 2


def _shift(left_out: Tensor, classes: Tensor, members: dict[int, Tensor], fallback: int) -> float:
    """What to add to the fallback's score.

    Of it there are many texts, of every other class few, so that the border is drawn from what is known of its own: it
    loses ``MISSED`` of them to the others, and no more. Where the others' texts leave a gap beyond that border, it
    moves on a part ``SHARE`` of the gap.
    """
    whole = torch.stack([group[0] for group in members.values()])
    others = left_out[whole].clone()
    others[:, fallback] = -torch.inf
    margin = left_out[whole, fallback] - others.amax(dim=1)  # above the border: the fallback
    mine = classes[whole] == fallback
    border, nearest = torch.quantile(margin[mine], MISSED), margin[~mine].max()
    return -float(border + SHARE * (nearest - border).clamp_max(0.0))

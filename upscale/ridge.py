"""The calibrated router's classifier: ridge regression on one-hot classes, in closed form, judged by leaving one out.

Symbols: ``n`` samples, ``d`` features, ``C`` classes, ``G`` groups of samples that belong together (one prompt's).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Relative to the mean squared length of a centred sample.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

MISSED = 0.05  # part of the fallback's own samples, mostly texts of two or three words, that may go elsewhere


@dataclass(frozen=True)
class Fit:
    """A classifier ``softmax(weight @ x + bias)`` and what it would say of samples that it was not fitted on.

    Attributes:
        weight: [C, d] float32.
        bias: [C] float32.
        penalty: the ridge penalty that was chosen.
        left_out: [n, C] float32, logits of each sample by the classifier fitted without its group.
        loss: mean negative log-likelihood of ``left_out``, classes weighted equally.
        loss_error: its standard error over groups.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    left_out: Tensor
    loss: float
    loss_error: float


def fit(x: Tensor, classes: Tensor, groups: Tensor, *, fallback: int | None = None) -> Fit:
    """Fit the classifier; the left-out loss decides on the penalty and on the sharpness of the softmax.

    Leaving a group out is exact and needs no second fit: with the hat matrix ``H`` of a ridge regression, the residual
    of the group's samples ``g`` by a fit without them is ``(I - H_gg)^-1 (y_g - yhat_g)`` (Cook & Weisberg 1982,
    section 2.2). Means and class weights are those of all samples.

    Args:
        x: [n, d] features, any float dtype; computed in float64.
        classes: [n] int64, 0 to C-1; every class has samples. All classes weigh the same, whatever their number.
        groups: [n] int64; samples of one group are left out together.
        fallback: a catch-all class, whose bias is shifted until it keeps all but ``MISSED`` of its left-out samples
            and leaves the rest of the space to the others.

    Raises:
        ValueError: a class has no sample.
    """
    x, count = x.double(), int(classes.max()) + 1
    target = F.one_hot(classes, count).double()
    if not bool((target.sum(dim=0) > 0).all()):
        raise ValueError("every class needs at least one sample")
    weight = (1 / target.sum(dim=0))[classes]
    weight = weight / weight.sum()  # [n], sums to 1
    root = weight.sqrt().unsqueeze(1)
    mean, prior = weight @ x, weight @ target
    a, b = root * (x - mean), root * (target - prior)
    gram = a @ a.T
    members = [torch.nonzero(groups == group)[:, 0] for group in groups.unique()]
    found = []
    for penalty in PENALTIES:
        # The penalised dual, [n, n]: few samples, many features.
        dual = torch.linalg.inv(gram + penalty * gram.diagonal().sum() * torch.eye(len(x), dtype=x.dtype) / len(x))
        left_out = _left_out(gram @ dual, b, members) / root + prior
        bias = torch.zeros_like(prior)
        if fallback is not None:
            bias[fallback] = _shift(left_out, classes, fallback)
        left_out = left_out + bias
        sharpness = min(SHARPNESS, key=lambda s: float(weight @ _losses(s * left_out, classes)))
        losses = weight * _losses(sharpness * left_out, classes)
        per_group = torch.stack([losses[g].sum() for g in members]) * len(members)
        error = float(per_group.std() / len(members) ** 0.5) if len(members) > 1 else 0.0
        coefficients = a.T @ (dual @ b)  # [d, C]
        bias = prior - mean @ coefficients + bias
        found.append(
            Fit(
                (sharpness * coefficients.T).float(),
                (sharpness * bias).float(),
                penalty,
                (sharpness * left_out).float(),
                float(losses.sum()),
                error,
            )
        )
    best = min(found, key=lambda f: f.loss)
    # The strongest penalty that is as good as the best within its error: of few samples, the simplest classifier.
    return next(f for f in reversed(found) if f.loss <= best.loss + best.loss_error)


def _losses(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits, classes, reduction="none")


def _left_out(hat: Tensor, target: Tensor, members: Sequence[Tensor]) -> Tensor:
    """Predictions [n, C] of each group by the regression without it."""
    residual, left_out = target - hat @ target, torch.empty_like(target)
    for g in members:
        identity = torch.eye(len(g), dtype=hat.dtype)
        left_out[g] = target[g] - torch.linalg.solve(identity - hat[g][:, g], residual[g])
    return left_out


def _shift(left_out: Tensor, classes: Tensor, fallback: int) -> float:
    """What to add to the fallback's score so that it loses ``MISSED`` of its own samples, and no more, to the others.

    Of the fallback there are many samples, of every other class few: the border is drawn where it is known.
    """
    mine = left_out[classes == fallback]
    others = mine.clone()
    others[:, fallback] = -torch.inf
    margin = mine[:, fallback] - others.amax(dim=1)  # above 0: rightly the fallback
    return -float(torch.quantile(margin, MISSED))

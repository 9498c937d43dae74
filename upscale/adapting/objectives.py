"""What adaptation minimises. Pure functions of logits, in float32.

Symbols: ``B`` examples, ``T`` places (tokens of an answer; 1 for a classifier), ``V`` classes or vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy, in nats, of each prediction: [..., V] -> [...] (arXiv 2402.00433, equation 7).

    Of each prediction by itself: the entropy of a batch's mean prediction, which some code minimises, rewards a model
    that says the same of everything.
    """
    log = logits.float().log_softmax(dim=-1)
    return -(log.exp() * log).sum(dim=-1)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats, of each prediction from the teacher's: [..., V], [..., V] -> [...]."""
    log, target = logits.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return F.kl_div(log, target, reduction="none", log_target=True).sum(dim=-1)


def per_example(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each example's ``values`` [B, T] over the places that ``mask`` [B, T] shows: [B]."""
    mask = mask.to(values.dtype)
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0)

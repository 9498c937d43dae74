"""SMILE (arXiv 2408.10174, section 4) in plain loops: one token, one expert at a time."""

import torch
from torch import Tensor


def decompose(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Full SVD, truncated: ``V_r`` [r, i] and ``U_r S_r`` [o, r]; directions of no energy in float32 are dropped."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    r = min(rank, int((s > s[0] * max(delta.shape) * torch.finfo(torch.float32).eps).sum()))
    return v[:r], u[:, :r] * s[:r]


def weights(x: Tensor, experts: list[tuple[Tensor, Tensor]], router_rank: int, top_k: int) -> Tensor:
    """Routing weights [E] of a token ``x`` [i]; an expert that did not change the linear has the logit -inf."""
    if len(experts) == 1:  # nothing to choose: pure delta compression
        return x.new_ones(1)
    if all(len(v) == 0 for v, _ in experts):
        return x.new_zeros(len(experts))
    logits = [(v[:router_rank] @ x).norm() if len(v) else x.new_tensor(-torch.inf) for v, _ in experts]
    p = torch.stack(logits).softmax(dim=0)
    kept = p.argsort(descending=True)[:top_k]
    w = torch.zeros_like(p)
    for e in kept:
        w[e] = p[e] / p[kept].sum()
    return w


def forward(x: Tensor, w0: Tensor, b0: Tensor | None, experts, bias_deltas, router_rank: int, top_k: int) -> Tensor:
    """``y = W0 x + b0 + sum_i p_i (U_r S_r V_r^T x + (b_i - b_0))`` for every token of ``x`` [..., i]."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = w0 @ token if b0 is None else w0 @ token + b0
        for e, p in enumerate(weights(token, experts, router_rank, top_k)):
            v, us = experts[e]
            y = y + p * (us @ (v @ token))
            if bias_deltas is not None:
                y = y + p * bias_deltas[e]
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)

"""WEMoE (arXiv 2402.00433), E-WEMoE (2410.21804) and rank-one WEMoE from the papers, one token at a time."""

import copy
from functools import partial

import torch

from tests.reference.models import paths, plain


def arithmetic(base, experts, scaling=0.3):
    """Task arithmetic: ``theta0 + scaling * sum_i (theta_i - theta0)`` of every tensor."""
    return {name: t + scaling * sum(expert[name] - t for expert in experts) for name, t in base.items()}


def pruned(delta, density):
    """The part ``density`` of a task vector's entries of largest magnitude, of equal ones the first; the rest is 0."""
    flat = delta.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda n: (-abs(flat[n]), n))
    kept = torch.zeros_like(delta).flatten()
    for n in order[: max(1, round(density * len(flat)))]:
        kept[n] = flat[n]
    return kept.view(delta.shape)


def one_token(h, layers):
    """The router on one token ``h`` [d]: ``layers`` are pairs (weight, bias); a constant is a bias without weight."""
    for weight, bias in layers[:-1]:
        h = torch.relu(weight @ h + bias)
    weight, bias = layers[-1]
    return bias if weight is None else weight @ h + bias


def weights(sequence, layers, causal=True):
    """The weights at every token of ``sequence`` [T, d]: the mean over the tokens so far, or over all of them."""
    rows = [one_token(h, layers) for h in sequence]
    return [torch.stack(rows[: n + 1] if causal else rows).mean(dim=0) for n in range(len(rows))]


def ensemble(theta0, taus):
    """WEMoE: ``theta0 + sum_i lambda_i tau_i`` for weights ``lambda`` [E] and task vectors by expert."""

    def theta(w):
        return {name: t + sum(w[e] * tau[name] for e, tau in enumerate(taus)) for name, t in theta0.items()}

    return theta


def rank_one(theta0, taus, rank, scaling=0.3):
    """Rank-one WEMoE: ``W0 + sum_i U_i diag(w_i) S_i V_i^T`` for weights [E * rank]; biases are merged, for good."""
    terms = {}
    for name, t in theta0.items():
        if t.ndim == 2:
            svds = [torch.linalg.svd(tau[name].double(), full_matrices=False) for tau in taus]
            terms[name] = [[s[j] * torch.outer(u[:, j], v[j]) for j in range(rank)] for u, s, v in svds]

    def theta(w):
        found = {}
        for name, t in theta0.items():
            if t.ndim == 2:
                added = [w[e * rank + j] * term for e, of in enumerate(terms[name]) for j, term in enumerate(of)]
                found[name] = (t.double() + sum(added)).float()
            else:
                found[name] = t + scaling * sum(tau[name] for tau in taus)
        return found

    return theta


def ensembled(model, thetas, routers, causal=True, seen=None):
    """``model``, in which the MLP modules named by ``thetas`` run with weights materialised anew for every token.

    ``routers`` are their routers' layers; ``seen`` collects the weights of each MLP, if it is a dictionary.
    """

    def run(module, args, y, name, twin):
        tokens = []
        for sequence in args[0]:
            lambdas = weights(sequence, routers[name], causal)
            if seen is not None:
                seen.setdefault(name, []).append(torch.stack(lambdas))
            tokens += [
                torch.func.functional_call(twin, thetas[name](w), (h[None, None],))
                for w, h in zip(lambdas, sequence, strict=True)
            ]
        return torch.cat(tokens).view(y.shape)

    for name in thetas:
        module = model.get_submodule(name)
        module.register_forward_hook(partial(run, name=name, twin=copy.deepcopy(module)))
    return model


def layers(values, place, depth):
    """The layers of one network of a checkpoint's router, by the names of its tensors."""
    if depth == 0:
        return [(None, values[f"networks.{place}.bias"])]
    names = [f"networks.{place}.{n}" for n in ((0,) if depth == 1 else (0, 2))]
    return [(values[f"{name}.weight"], values[f"{name}.bias"]) for name in names]


def states(group):
    """Tensors of the base, and of each expert."""
    base, experts = paths(group)
    return plain(base).state_dict(), [plain(path).state_dict() for path in experts.values()]


def of_group(group, values, depth, shared=False, thin=lambda tau: tau, rank=None, seen=None):
    """The WEMoE of a group whose MLPs are modules ``mlp``, with the routers of these tensors.

    ``thin`` makes of a task vector what is kept of it; ``rank`` is of rank-one WEMoE.
    """
    base, experts = states(group)
    model, thetas, routers = plain(group.base.resolve()), {}, {}
    model.load_state_dict(arithmetic(base, experts))
    for number, name in enumerate(n for n, _ in model.named_modules() if n.endswith(".mlp")):
        theta0 = {n.removeprefix(f"{name}."): t for n, t in base.items() if n.startswith(f"{name}.")}
        taus = [{n: thin(expert[f"{name}.{n}"] - t) for n, t in theta0.items()} for expert in experts]
        thetas[name] = ensemble(theta0, taus) if rank is None else rank_one(theta0, taus, rank)
        routers[name] = layers(values, "shared" if shared else number, depth)
    return ensembled(model, thetas, routers, seen=seen)

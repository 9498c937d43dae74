"""Plain access to models and their files, for comparing: no code of the package's own."""

from functools import partial

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(7))

GREEDY = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 2,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits.float()


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def plain(directory):
    """The base class's own model, no experts."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def tensors(directory):
    """Every tensor of a checkpoint's files."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def paths(group):
    """Directories: the base's, and each expert's by name."""
    return group.base.resolve(), {name: source.resolve() for name, source in group.experts.items()}


def in_block(name):
    return any(part.isdigit() for part in name.split("."))


def block_linears(model):
    """Parameter names of the linears in the decoder blocks."""
    kinds = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and in_block(n)]
    return {f"{name}.{p}" for name, module in kinds for p, _ in module.named_parameters()}


def dense(base, expert):
    """The base with the decoder blocks' linears of an expert: what forcing that expert at full rank must give."""
    model, tune = plain(base), plain(expert).state_dict()
    upscaled = block_linears(model)
    model.load_state_dict({n: tune[n] if n in upscaled else t for n, t in model.state_dict().items()})
    return model


def generate(model, ids, mask=None, **kwargs):
    """Greedy new tokens [B, T], and the logits [B, T, V] that they were chosen by."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, **GREEDY | kwargs)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def beam_search(score, prompt, beams, steps):
    """The likeliest hypothesis after so many steps; ``score(ids)`` gives the logits [1, T, V] of a whole pass."""
    kept = [(0.0, prompt.tolist())]
    for _ in range(steps):
        longer = []
        for total, ids in kept:
            said = score(torch.tensor([ids]))[0, -1].double().log_softmax(dim=-1)
            values, tokens = said.topk(beams)
            longer += [(total + float(v), [*ids, int(t)]) for v, t in zip(values, tokens, strict=True)]
        kept = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return torch.tensor(kept[0][1][len(prompt) :])


def padded(rows):
    """Left-padded ids and mask."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), 2), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


def blended(base, experts, held, accepts=lambda name: True):
    """The base, in which the output of every module that ``accepts`` names is mixed with the experts' own modules.

    ``y = M0(x) + sum_e w_e (Me(x) - M0(x))`` for linears, embeddings and norms alike: all are affine in their
    parameters. ``held["w"]`` is [B, T, E], of the tokens that the model is given; None for the base.
    """
    model, tunes = plain(base), [plain(path) for path in experts]

    def blend(module, args, y, twins):
        if held["w"] is None:
            return y
        w = held["w"].to(y.dtype)
        w = w.flatten(0, 1) if y.ndim == 2 else w[:, -y.shape[1] :]  # the head may see the last token alone
        w = w.view(*w.shape[:-1], *[1] * (y.ndim - w.ndim), w.shape[-1])  # norms of heads have one dimension more
        return y + sum(w[..., e, None] * (twin(*args) - y) for e, twin in enumerate(twins))

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and accepts(name):
            module.register_forward_hook(partial(blend, twins=[tune.get_submodule(name) for tune in tunes]))
    return model


def blocks(model):
    """The decoder blocks of a plain model."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))

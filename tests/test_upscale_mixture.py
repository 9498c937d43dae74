"""One mixture layer, injected into a real linear, against the plain loops of tests/reference/smile.py."""

import copy
import json
import shutil
from itertools import product

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from tests.reference import smile as reference
from tests.reference.models import IDS, blended, blocks, close, generate, logits, padded, paths
from upscale import load
from upscale.building.methods.smile import router, upscale_linear
from upscale.building.skeleton import Linear, Skeleton
from upscale.config import SmileConfig
from upscale.runtime.layout_upscaled import Layout, ModuleLayout
from upscale.runtime.modeling_upscaled import inject
from upscale.runtime.router_upscaled import Router
from upscale.runtime.routers_upscaled import ROUTERS

I, O = 24, 18  # noqa: E741
NAMES = ("a", "b", "c")


class Model(nn.Module):
    """The smallest model that experts can be injected into."""

    dtype = property(lambda self: self.linear.weight.dtype)
    config = PretrainedConfig()

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)

    def get_input_embeddings(self):
        return None


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deltas(ranks, seed=10):
    """Deltas of just these ranks, 0 for an idle expert."""
    return [randn(O, r, seed=seed + e) @ randn(r, I, seed=seed + 50 + e) * 0.1 for e, r in enumerate(ranks)]


def biases(count, seed=90):
    return [randn(O, seed=seed + e) for e in range(count)]


def make(config, weight_deltas, bias_deltas=None, conv=False, base_bias=True, dtype=torch.float32):
    """A Model with a mixture layer, and its base weight [o, i] and bias."""
    linear = Conv1D(O, I) if conv else nn.Linear(I, O, bias=base_bias)
    w0, b0 = randn(O, I, seed=1), randn(O, seed=2)
    with torch.no_grad():
        linear.weight.copy_(w0.T if conv else w0)
        if linear.bias is not None:
            linear.bias.copy_(b0)
    names = NAMES[: len(weight_deltas)]
    named_biases = None if bias_deltas is None else dict(zip(names, bias_deltas, strict=True))
    whole = Linear("linear", "linear.weight", "linear.bias", I, O, transposed=conv, head=False)
    given = zip(names, weight_deltas, strict=True)
    upscaled = upscale_linear(whole, given, named_biases, (config.rank,) * len(names), range(len(names)), config)
    model = Model(linear).to(dtype)
    model.routing = inject(
        model, Layout("smile", names, router(Skeleton((), (), ()), {}, config)[0], {"linear": upscaled.layout})
    )
    with torch.no_grad():
        for name, tensor in upscaled.tensors.items():
            getattr(model.linear.experts, name).copy_(tensor)
    return model, w0, b0 if linear.bias is not None else None


def expected(x, w0, b0, weight_deltas, bias_deltas, config):
    experts = [reference.decompose(d, config.rank) for d in weight_deltas]
    bias = None if bias_deltas is None else [b.double() for b in bias_deltas]
    b0 = None if b0 is None else b0.double()
    return reference.forward(x.double(), w0.double(), b0, experts, bias, config.router_rank, config.top_k).float()


RANKS = {"even": (9, 9, 9), "ragged": (9, 2, 5), "one_idle": (9, 0, 5), "two_idle": (0, 0, 9), "full": (18, 18, 18)}


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_layer_is_the_papers(ranks, top_k, conv):
    for rank, router_rank, with_bias in product((6, 100), (1, 3, 6), (False, True)):
        config = SmileConfig(rank=rank, router_rank=router_rank, top_k=top_k, exact=True)
        weight_deltas, bias_deltas = deltas(ranks), biases(3) if with_bias else None
        model, w0, b0 = make(config, weight_deltas, bias_deltas, conv)
        assert model.linear.experts.ranks == tuple(min(r, rank) for r in ranks)
        for x in (randn(7, I, seed=5), randn(2, 4, I, seed=6)):
            want = expected(x, w0, b0, weight_deltas, bias_deltas, config)
            torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(I,), (1, I), (0, I), (3, 1, I), (2, 5, I)])
def test_any_batch_shape(shape):
    config = SmileConfig(rank=4, router_rank=2, top_k=2)
    model, w0, b0 = make(config, deltas((9, 0, 5)), base_bias=False)
    x = randn(*shape, seed=5)
    got = model(x)
    assert got.shape == (*shape[:-1], O)
    if x.numel():
        torch.testing.assert_close(got, expected(x, w0, b0, deltas((9, 0, 5)), None, config), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("idle", [False, True])
def test_one_expert_is_always_on(idle):
    """Pure delta compression: at full rank the layer is the fine-tuned linear, whatever the input."""
    delta, bias = (torch.zeros(O, I) if idle else deltas((18,))[0]), biases(1)[0]
    model, w0, b0 = make(SmileConfig(rank=100), [delta], [bias])
    x = randn(6, I) * torch.logspace(-4, 3, 6)[:, None]
    torch.testing.assert_close(model(x), nn.functional.linear(x, w0 + delta, b0 + bias), atol=1e-4, rtol=1e-4)


def test_idle_weights_with_changed_biases_leave_the_base():
    model, w0, b0 = make(SmileConfig(rank=4, router_rank=2), deltas((0, 0, 0)), biases(3))
    x = randn(6, I)
    assert torch.equal(model(x), nn.functional.linear(x, w0, b0))
    model.routing.forced = model.routing.one_hot("b")  # but whoever forces an expert gets its bias
    torch.testing.assert_close(model(x), nn.functional.linear(x, w0, b0 + biases(3)[1]))


def test_equal_logits_mix_uniformly():
    """Three experts with the same input directions: top_k = E gives each token their average."""
    down, ups = randn(5, I, seed=3), [randn(O, 5, seed=e) for e in range(3)]
    same = [up @ down for up in ups]  # row spaces are equal, and all 5 directions are looked at
    model, w0, b0 = make(SmileConfig(rank=5, router_rank=5, top_k=3), same)
    x = randn(8, I)
    want = nn.functional.linear(x, w0 + torch.stack(same).mean(dim=0), b0)
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_sparse_normalised_and_never_go_to_an_idle_expert(top_k):
    config = SmileConfig(rank=6, router_rank=3, top_k=top_k)
    model, _, _ = make(config, deltas((9, 0, 5)))
    x = torch.cat([randn(200, I), torch.zeros(1, I), 1e4 * randn(20, I), 1e-6 * randn(20, I)])
    model.routing.trace = {}
    model(x)
    w = model.routing.trace["linear"]
    assert w.dtype == torch.float32
    assert torch.equal(w[:, 1], torch.zeros(len(x)))
    assert ((w != 0).sum(dim=1) <= top_k).all()
    torch.testing.assert_close(w.sum(dim=1), torch.ones(len(x)))
    experts = [reference.decompose(d, 6) for d in deltas((9, 0, 5))]
    want = torch.stack([reference.weights(token.double(), experts, 3, top_k) for token in x]).float()
    torch.testing.assert_close(w[:200], want[:200], atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_bfloat16_is_the_papers_up_to_its_rounding(top_k):
    """The reference computes in float64 from the stored tensors; the bound adds one rounding per operation.

    Tokens whose choice of experts hangs on less than the rounding of the logits may go either way: they are left out.
    """
    ranks, eps = (9, 5, 9), 2.0**-8
    config = SmileConfig(rank=6, router_rank=3, top_k=top_k, exact=True)
    model, _, _ = make(config, deltas(ranks), biases(3), dtype=torch.bfloat16)
    x = randn(64, I, seed=5).bfloat16()
    layer = model.linear.experts
    split = list(zip(layer.down.double().split(layer.ranks), layer.up.double().split(layer.ranks, dim=1), strict=True))
    w0, b0, bias = (t.detach().double() for t in (model.linear.weight, model.linear.bias, layer.bias))
    logits = torch.stack([(x.double() @ v[:3].T).norm(dim=1) for v, _ in split], dim=1)
    ordered = logits.sort(dim=1, descending=True).values
    clear = torch.ones(len(x), dtype=torch.bool)
    if top_k < 3:
        clear = ordered[:, top_k - 1] - ordered[:, top_k] > 2 * eps * ordered[:, 0]
    assert clear.sum() > 40
    got = model(x)
    assert got.dtype == torch.bfloat16
    x = x[clear].double()
    want = reference.forward(x, w0, b0, split, bias, 3, top_k)
    w = torch.stack([reference.weights(token, split, 3, top_k) for token in x])
    terms = sum(w[:, e, None] * (((x @ v.T).abs() @ us.abs().T) + bias[e].abs()) for e, (v, us) in enumerate(split))
    error_of_weights = 0 if top_k == 1 else 2 * ordered[clear, :1]  # d log p <= 2 max |d logit|
    bound = eps * ((x @ w0.T + b0).abs() + 2 * want.abs() + (4 + error_of_weights) * terms)
    assert ((got[clear].double() - want).abs() <= bound).all()


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_compiles_in_one_graph(ranks, top_k):
    torch._dynamo.reset()
    model, _, _ = make(SmileConfig(rank=6, router_rank=3, top_k=top_k), deltas(ranks), biases(3), conv=top_k == 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for x in (randn(7, I), randn(2, 3, I)):
        assert torch.equal(compiled(x), model(x))
    model.routing.forced = model.routing.one_hot("b")
    assert torch.equal(compiled(x), model(x))


def test_gradients_are_those_of_the_paper():
    config = SmileConfig(rank=6, router_rank=3, top_k=2)
    model, w0, b0 = make(config, deltas((9, 0, 5)), biases(3))
    layer, x = model.linear.experts, randn(5, I)
    model(x).square().sum().backward()
    down, up, bias = (t.detach().double().requires_grad_() for t in (layer.down, layer.up, layer.bias))
    split = list(zip(down.split(layer.ranks), up.split(layer.ranks, dim=1), strict=True))
    reference.forward(x.double(), w0.double(), b0.double(), split, bias, 3, 2).square().sum().backward()
    for got, want in ((layer.down, down), (layer.up, up), (layer.bias, bias)):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_forcing_overrides_the_router(conv):
    weight_deltas, bias_deltas = deltas((18, 0, 18)), biases(3)
    model, w0, b0 = make(SmileConfig(rank=100, router_rank=2), weight_deltas, bias_deltas, conv)
    x = randn(4, 5, I)
    by_hand = {
        name: nn.functional.linear(x, w0 + delta, b0 + bias)
        for name, delta, bias in zip(NAMES, weight_deltas, bias_deltas, strict=True)
    } | {"base": nn.functional.linear(x, w0, b0)}
    for name, want in by_hand.items():
        model.routing.forced = model.routing.one_hot(name)
        torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model(x.flatten(0, 1)), want.flatten(0, 1), atol=1e-4, rtol=1e-5)
    names = ["c", "base", "a", "b"]
    model.routing.forced = model.routing.one_hot(names)
    want = torch.stack([by_hand[name][n] for n, name in enumerate(names)])
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model(x.flatten(0, 1)), want.flatten(0, 1), atol=1e-4, rtol=1e-5)  # B and T flattened
    beams = x.repeat_interleave(3, dim=0)  # generate repeats each sequence for its beams
    torch.testing.assert_close(model(beams), want.repeat_interleave(3, dim=0), atol=1e-4, rtol=1e-5)


def test_forcing_refuses_unknown_names_and_batches_that_do_not_fit():
    model, _, _ = make(SmileConfig(rank=4, router_rank=2), deltas((9, 9, 9)))
    with pytest.raises(ValueError, match=r"no expert nobody, zed in this model; it has a, b, c and base"):
        model.routing.one_hot(["a", "zed", "nobody"])
    assert model.routing.one_hot(None) is None
    model.routing.forced = model.routing.one_hot(["a", "b", "c"])
    for shape in ((2, 3, I), (2, 6, I), (4, I)):  # 3 rows fit 6 tokens, but not 2 sequences
        with pytest.raises(ValueError, match="3 experts are forced, one per sequence; they do not fit"):
            model(randn(*shape))


def test_a_layout_goes_through_config_and_back():
    modules = {
        "a": ModuleLayout(4, 6, (2, 0), True),
        "b": ModuleLayout(4, 9, (2, 3), False, "embedding"),
        "c": ModuleLayout(4, 9, (2, 3), False, "linear", "b"),
        "d": ModuleLayout(4, 4, (0, 0), True, "norm"),
        "e": ModuleLayout(4, 4, (0, 0), False, "norm"),
    }
    layout = Layout("smile", ("x", "y"), {"type": "projection", "rank": 1, "top_k": 1}, modules)
    section = json.loads(json.dumps(layout.to_config()))
    assert Layout.from_config(section) == layout
    assert section["modules"]["a"] == {"in_features": 4, "out_features": 6, "ranks": [2, 0], "bias": True}
    assert section["modules"]["c"].keys() - section["modules"]["a"].keys() == {"tied"}
    assert layout.shapes() == {
        "a.experts.down": (2, 4),
        "a.experts.up": (6, 2),
        "a.experts.bias": (2, 6),
        "b.experts.down": (5, 4),
        "b.experts.up": (9, 5),
        "d.experts.scale": (2, 4),
        "d.experts.shift": (2, 4),
        "e.experts.scale": (2, 4),
    }


class Toy(Router):
    """Looks at the tokens, once for the model; or at three hidden features of what enters each block but the first."""

    def __init__(self, scope):
        super().__init__()
        self.scope, self.sharpness = scope, 4

    def watches(self, depth):
        return (depth == 0) == (self.scope == "model")

    def read(self, tokens):
        self.decided = (self.sharpness * torch.stack([tokens % n for n in (2, 3, 5)], dim=-1).float()).softmax(dim=-1)

    def enter(self, depth, hidden):
        self.decided = (self.sharpness * hidden[..., :3]).softmax(dim=-1)

    def forward(self, name, x, z, ranks):
        return self.decided


@pytest.fixture(params=["block", "model"])
def toy(request, architecture, builds, groups, monkeypatch, tmp_path):
    """A checkpoint that names a router of this scope, loaded; and the base mixed by hand with the experts in full."""
    monkeypatch.setitem(ROUTERS, "toy", lambda modules: Toy(request.param))
    directory = tmp_path / "toy"
    shutil.copytree(builds(architecture, 3, rank=1000)[0], directory)
    config = json.loads((directory / "config.json").read_text())
    config["upscale"]["router"] = {"type": "toy"}
    (directory / "config.json").write_text(json.dumps(config))
    model = load(directory)
    base, experts = paths(groups(architecture, 3))
    held = {"w": None}
    by_hand, router = blended(base, experts.values(), held), Toy(request.param)

    def start(module, args, kwargs):
        held["w"] = None
        if request.param == "model":
            router.read(kwargs["input_ids"])
            held["w"] = router.decided

    def decide(block, args, kwargs):
        router.enter(1, args[0] if args else kwargs["hidden_states"])
        held["w"] = router.decided

    by_hand.register_forward_pre_hook(start, with_kwargs=True)
    for block in blocks(by_hand)[1:] if request.param == "block" else []:
        block.register_forward_pre_hook(decide, with_kwargs=True)
    return model, by_hand


def test_every_module_obeys_a_router_of_tokens_or_hidden_states(toy):
    model, by_hand = toy
    close(logits(model), logits(by_hand))
    tokens, chosen_by = generate(model, IDS)
    want, want_chosen_by = generate(by_hand, IDS)
    assert torch.equal(tokens, want)
    close(chosen_by, want_chosen_by)
    rows = [IDS[0, :5], IDS[1], IDS[0, 3:11]]
    tokens, chosen_by = generate(model, *padded(rows))
    for n, row in enumerate(rows):
        want, want_chosen_by = generate(by_hand, row[None])
        assert torch.equal(tokens[n], want[0])
        close(chosen_by[n], want_chosen_by[0])


def test_forcing_overrides_a_router_of_hidden_states(toy, architecture, builds):
    model, _ = toy
    projection = load(builds(architecture, 3, rank=1000)[0])
    for expert in ("e1", "e3", "base", ["e2", "base"]):
        with model.force(expert), projection.force(expert):
            assert torch.equal(logits(model), logits(projection))


def test_a_copy_has_a_router_of_its_own(toy):
    model, _ = toy
    twin, want = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), want)
    twin.routing.router.sharpness = -4
    other = logits(twin)
    assert not torch.equal(other, want)
    assert torch.equal(logits(model), want)

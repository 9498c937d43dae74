"""`--rest experts`: embeddings, heads and norms are experts too, so that forcing an expert is its fine-tune."""

import copy
import json
import re

import pytest
import torch
from transformers import GPTNeoXConfig, PhiConfig, Qwen3Config

from tests.architectures import SHAPE, TABLE, Architecture
from tests.conftest import perturbed, save_model
from tests.reference.models import IDS, blended, close, in_block, logits, paths, plain, tensors
from upscale import load, smile
from upscale.errors import ConfigError
from zoo import Group

FULL = 1000  # clamped: full rank
SMALL = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BEYOND = [
    Architecture("qwen3", lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True)),  # norms of single heads
    Architecture("gpt_neox", lambda: GPTNeoXConfig(**SMALL, num_attention_heads=2)),  # a head of another name in files
    Architecture("phi", lambda: PhiConfig(**SMALL, num_attention_heads=2)),  # a head with a bias
]
LLAMA, QWEN2, GPT2, GEMMA2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "qwen2", "gpt2", "gemma2"))
TIED = [a for a in TABLE if a.model(0).config.tie_word_embeddings]


@pytest.fixture(params=[*TABLE, *BEYOND], ids=lambda architecture: architecture.name)
def architecture(request) -> Architecture:
    return request.param


def is_norm(name):
    return "norm" in name or "ln_" in name


def test_full_rank_and_a_forced_expert_is_the_fine_tune(architecture, groups, builds):
    out, report = builds(architecture, 3, rank=FULL)
    model = load(out)
    base, experts = paths(groups(architecture, 3))
    tunes = {name: logits(plain(path)) for name, path in experts.items()}
    for name, want in tunes.items():
        with model.force(name):
            close(logits(model), want)
        assert report.left_behind(name) == pytest.approx((0, 0), abs=1e-4)
        assert report.energy[name] == pytest.approx(1, abs=1e-6)
    was = logits(plain(base))
    with model.force("base"):
        assert torch.equal(logits(model), was)
    with model.force(["e3", "base"]):
        mixed = logits(model)
    close(mixed[0], tunes["e3"][0])
    assert torch.equal(mixed[1], was[1])
    # Nothing that a fine-tune changed is missing from the layout: parameters are those of the modules in it.
    owned = {f"{name}.{p}" for name in model.layout.modules for p in ("weight", "bias")}
    assert {name for name, _ in plain(base).named_parameters()} <= owned


@pytest.mark.parametrize("options", [{}, {"scope": "model", "granularity": "prefix"}], ids=str)
def test_a_single_expert_is_always_on(architecture, groups, builds, options):
    model = load(builds(architecture, 1, rank=FULL, **options)[0])
    _, experts = paths(groups(architecture, 1))
    close(logits(model), logits(plain(experts["e1"])))


def test_any_weights_mix_the_modules_of_the_fine_tunes(architecture, groups, builds):
    model = load(builds(architecture, 3, rank=FULL)[0])
    base, experts = paths(groups(architecture, 3))
    w = torch.tensor([[0.2, 0.5, 0.1], [0.0, -0.3, 1.1]])
    by_hand = blended(base, experts.values(), {"w": w.unsqueeze(1).expand(-1, IDS.shape[1], -1)})
    model.routing.forced = w
    want = logits(by_hand)
    close(logits(model), want)
    assert not torch.allclose(want, logits(plain(base)), atol=0.1)


def test_the_projection_router_leaves_embeddings_and_norms_idle(architecture, builds):
    """Bit for bit what is built without them; the head, tied or not, is a linear like others."""
    options = {"rank": 16, "router_rank": 4, "top_k": 2}
    everything, linears = (load(builds(architecture, 3, **options, **more)[0]) for more in ({}, LINEARS))
    others = everything.layout.modules.keys() - linears.layout.modules.keys()
    assert {everything.layout.modules[name].kind for name in others} == {"norm", "embedding"}
    everything.routing.trace = {}
    assert torch.equal(logits(everything), logits(linears))
    for name, w in everything.routing.trace.items():
        assert bool(w.any()) == (name not in others)


LINEARS = {"rest": "base", "lm_head": True}


def test_an_expert_that_equals_the_base_is_the_base(architecture, groups, tmp_path):
    base, experts = paths(groups(architecture, 1))
    smile(Group.of(base, {"same": base, "e1": experts["e1"]}), tmp_path / "out", rank=FULL)
    model = load(tmp_path / "out")
    with model.force("same"):
        assert torch.equal(logits(model), logits(plain(base)))
    with model.force("e1"):
        close(logits(model), logits(plain(experts["e1"])))
    for layout in model.layout.modules.values():
        assert layout.ranks[0] == 0


LINEAR_GLOBS = ("*proj*", "*query_key_value*", "*dense*", "*c_attn*", "*c_fc*", "*fc1*", "*fc2*")
KINDS = {  # patterns, and what they are to match
    "embeddings": (("*embed*", "*wte*", "*wpe*"), lambda n: "embed" in n or "wte" in n or "wpe" in n),
    "head": (("lm_head",), lambda n: n == "lm_head"),
    "norms": (("*norm*", "*ln_*"), is_norm),
    "linears": (LINEAR_GLOBS, lambda n: in_block(n) and not is_norm(n)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_excluded_stays_the_bases_and_is_reported(architecture, groups, builds, kind):
    globs, excluded = KINDS[kind]
    out, report = builds(architecture, 2, rank=FULL, exclude=globs)
    model = load(out)
    base, experts = paths(groups(architecture, 2))
    assert not any(excluded(name) for name in model.layout.modules)
    was = {n: p.data for n, p in plain(base).named_parameters()}
    for name, path in experts.items():
        with model.force(name):
            held = {"w": torch.ones(*IDS.shape, 1)}
            close(logits(model), logits(blended(base, [path], held, lambda n: not excluded(n))))
        now = {n: p.data for n, p in plain(path).named_parameters()}
        lost = sum(float((now[n] - was[n]).norm()) ** 2 for n in was if excluded(n.rpartition(".")[0]))
        assert report.left_behind(name)[1] == pytest.approx(lost**0.5, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- tied heads
@pytest.fixture(params=TIED, ids=lambda architecture: architecture.name)
def tied(request) -> Architecture:
    return request.param


def factors(model):
    """Of the embedding and of the head that is tied to it."""
    (head,) = [name for name, layout in model.layout.modules.items() if layout.tied]
    embedding = model.get_submodule(model.layout.modules[head].tied)
    assert (model.get_output_embeddings(), model.get_input_embeddings()) == (model.get_submodule(head), embedding)
    return embedding.experts, model.get_submodule(head).experts


def assert_shared(model):
    embedding, head = factors(model)
    assert head.down is embedding.down and head.up is embedding.up
    assert not list(head.parameters()) and not head.state_dict()
    assert len([n for n in model.state_dict() if "lm_head" in n]) == 1  # the base's own alias of its weight


def test_a_tied_head_stores_no_factors_and_follows_the_embeddings(tied, groups, builds, tmp_path):
    out, _ = builds(tied, 2, rank=FULL)
    assert not [name for name in tensors(out) if "lm_head" in name]
    model = load(out)
    assert_shared(model)
    _, experts = paths(groups(tied, 2))
    for name, path in experts.items():
        with model.force(name):
            close(logits(model.to(torch.float64)), logits(plain(path).to(torch.float64)))
    assert_shared(model)
    assert factors(model)[1].up.dtype == torch.float64
    twin = copy.deepcopy(model)
    assert_shared(twin)
    factors(twin)[0].up.data.zero_()
    assert factors(twin)[1].up.any() == False and factors(model)[1].up.any()  # noqa: E712 (a tensor)
    model.float().save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_shared(again)
    assert tensors(tmp_path / "saved").keys() == tensors(out).keys()
    for name in ("e1", "e2", "base"):
        with model.force(name), again.force(name):
            assert torch.equal(logits(again), logits(model))


def test_a_tied_head_whose_embeddings_are_excluded_has_factors_of_its_own(tied, builds):
    out, _ = builds(tied, 2, rank=FULL, exclude=KINDS["embeddings"][0])
    assert {"lm_head.experts.down", "lm_head.experts.up"} <= tensors(out).keys()
    assert load(out).layout.modules["lm_head"].tied is None


# ---------------------------------------------------------------------------------------------------------------- norms
@pytest.mark.parametrize("architecture", [LLAMA, GPT2, GEMMA2], ids=lambda a: a.name, indirect=True)
@pytest.mark.parametrize("gain", [0.0, 1e-40])
def test_a_gain_of_zero_cannot_be_scaled_and_is_reported(architecture, tmp_path, gain):
    """Or a gain so small that the quotient overflows: there the expert's own gain is lost, and nothing else."""
    stored = gain - 1 if architecture is GEMMA2 else gain  # Gemma stores what is added to 1
    at = [3, 17]
    base, tune = architecture.model(0), perturbed(architecture, 1)
    (norm,) = [
        n for n, _ in base.named_parameters() if n.endswith(("layers.1.input_layernorm.weight", "h.1.ln_1.weight"))
    ]
    base.get_parameter(norm).data[at] = stored
    paths = save_model(base, tmp_path / "base"), save_model(tune, tmp_path / "e")
    report = smile(Group.of(paths[0], {"e": paths[1]}), tmp_path / "out", rank=FULL)
    delta = tune.get_parameter(norm).data[at] - stored
    (of_norm,) = [r for r in report.rest if r.name == norm]
    assert of_norm.left["e"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert report.left_behind("e")[1] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "out").values())
    tune.get_parameter(norm).data[at] = stored
    model = load(tmp_path / "out")
    close(logits(model), logits(tune))
    with model.force("base"):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_keep_exact_norms_rounded_once(architecture, tmp_path, dtype):
    base, tune = architecture.model(0).to(dtype), perturbed(architecture, 1).to(dtype)
    group = Group.of(save_model(base, tmp_path / "base"), {"e": save_model(tune, tmp_path / "e")})
    smile(group, tmp_path / "out", rank=FULL)
    stored = tensors(tmp_path / "out")
    assert {t.dtype for t in stored.values()} == {dtype}
    was, now = ({n: t.double() for n, t in model.named_parameters()} for model in (base, tune))
    offset = 1.0 if architecture is GEMMA2 else 0.0
    scales = [name for name in stored if name.endswith(".experts.scale")]
    assert len(scales) == len([n for n in was if is_norm(n) and n.endswith("weight")])
    for name in scales:
        norm = name.removesuffix(".experts.scale")
        quotient = (now[f"{norm}.weight"] - was[f"{norm}.weight"]) / (offset + was[f"{norm}.weight"])
        assert_rounded_once(stored[name][0], quotient)
        if f"{norm}.bias" in was:
            shift = now[f"{norm}.bias"] - was[f"{norm}.bias"] - was[f"{norm}.bias"] * quotient
            assert_rounded_once(stored[f"{norm}.experts.shift"][0], shift)
    model = load(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {dtype}
    want = logits(tune.float())
    assert (logits(model) - want).norm() <= 0.03 * want.norm()
    with model.force("base"):
        assert torch.equal(logits(model), logits(load(group.base.location)))


def assert_rounded_once(got, exact):
    nearest = exact.to(got.dtype)
    ulp = (torch.nextafter(nearest.abs(), torch.full_like(nearest, torch.inf)) - nearest.abs()).double()
    assert ((got.double() - exact).abs() <= 0.501 * ulp + 1e-7).all()


# -------------------------------------------------------------------------------------------------------------- budgets
def test_the_smallest_budget_that_is_named_can_be_met_and_nothing_smaller(groups, tmp_path):
    group = groups(QWEN2, 2)
    with pytest.raises(ConfigError, match="with one direction for every expert") as error:
        smile(group, tmp_path / "out", budget="1.001x")
    smallest = float(re.search(r"the smallest is ([\d.]+)x", str(error.value))[1])
    with pytest.raises(ConfigError, match="cannot be met"):
        smile(group, tmp_path / "out", budget=f"{smallest - 0.001:.3f}x")
    assert not list(tmp_path.iterdir())
    report = smile(group, tmp_path / "out", budget=f"{smallest:.3f}x")
    assert report.result_bytes <= smallest * report.base_bytes
    modules = json.loads((tmp_path / "out/config.json").read_text())["upscale"]["modules"].values()
    for number in range(2):
        assert sum(m["ranks"][number] for m in modules if "tied" not in m) >= 1
    for energy in (0.5, 0.95):
        report = smile(group, tmp_path / f"{energy}", energy=energy, exact=True)
        assert all(kept >= energy for kept in report.energy.values())  # more: an output head loses less than others

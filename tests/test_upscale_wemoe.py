"""`upscale.wemoe` against the papers in plain code: the merge before adaptation, and any router after it."""

import pytest
import torch
from transformers import MambaConfig, OPTConfig

import zoo.writing.writer
from tests.architectures import TABLE, Architecture
from tests.cli_runs import assert_one_message, every_file, inline, upscale
from tests.conftest import perturbed, save_model
from tests.reference import wemoe as reference
from tests.reference.models import IDS, close, generate, logits, padded, plain, tensors
from tests.routers import copied
from upscale import load, merge, router_file, wemoe
from upscale.building.methods.wemoe import MLPS
from upscale.errors import PlanError
from upscale.runtime.routers_upscaled import make_router
from zoo import Group

LLAMA, GPT2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "gpt2"))
# Flattens sequences and tokens before its MLPs, which are no modules of their own.
OPT = Architecture(
    "opt",
    lambda: OPTConfig(
        vocab_size=259, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64
    ),
)
# Has no MLP.
MAMBA = Architecture(
    "mamba", lambda: MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False)
)
FULL = {  # nothing is left out
    "low-rank": {"vectors": "low-rank", "rank": 1000},
    "dense": {"vectors": "dense"},
    "sparse": {"vectors": "sparse", "density": 1.0},
    "rank-one": {"vectors": "rank-one", "rank": 1000},
}
ROWS = [IDS[0, :5], IDS[1], IDS[0, 3:11]]


@pytest.fixture(params=FULL)
def full(request):
    return FULL[request.param]


@pytest.fixture(params=[LLAMA, GPT2], ids=lambda a: a.name)
def llama_or_gpt2(request):
    return request.param


def mlp(name):
    return ".mlp." in name


def randomise(directory, seed=0, size=0.4):
    """Give a checkpoint routers of random numbers, whose weights differ between tokens; returns them by name."""
    _, layout = router_file.opened(directory)
    settings = {key: value for key, value in layout.router.items() if key != "tensors"}
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in make_router(layout.modules, settings).shapes().items():
        values[name] = size / (shape[-1] ** 0.5 if len(shape) == 2 else 1) * torch.randn(shape, generator=generator)
    router_file.replace(directory, layout, settings, values, {"by": "hand"})
    return values


# ---------------------------------------------------------------------------------------------------- before adaptation
def test_an_untrained_model_is_the_merge(architecture, full, groups, wemoes, tmp_path):
    merge(groups(architecture, 3), tmp_path / "merged", "task-arithmetic")
    close(logits(load(wemoes(architecture, **full))), logits(plain(tmp_path / "merged")), 1e-5)


def test_an_average_is_an_average_inside_too(architecture, groups, wemoes, tmp_path):
    merge(groups(architecture, 3), tmp_path / "merged", "average")
    close(logits(load(wemoes(architecture, merge="average", rank=1000))), logits(plain(tmp_path / "merged")), 1e-5)


@pytest.mark.parametrize("full", [FULL["low-rank"], FULL["rank-one"]], ids=["low-rank", "rank-one"])
def test_a_trimmed_merge_outside_and_the_bases_own_inside(architecture, full, groups, wemoes, tmp_path):
    """TIES outside the MLPs, bit for bit; inside the base's tensors, to which the routers add 0.3 of each vector."""
    group = groups(architecture, 3)
    merge(group, tmp_path / "ties", "ties")
    ties, (base, experts) = tensors(tmp_path / "ties"), reference.states(group)
    out = wemoes(architecture, merge="ties", **full)
    stored = tensors(out)
    for name, tensor in ties.items():
        inside = mlp(name) and not (full["vectors"] == "rank-one" and name.endswith("bias"))
        assert torch.equal(stored[name], base[name] if inside else tensor), name
    want, merged = plain(tmp_path / "ties"), reference.arithmetic(base, experts)
    state = want.state_dict()
    biases = full["vectors"] == "rank-one"
    want.load_state_dict(
        {n: merged[n] if mlp(n) and not (biases and n.endswith("bias")) else t for n, t in state.items()}
    )
    close(logits(load(out)), logits(want), 1e-5)


@pytest.mark.parametrize("scaling", [0.0, 0.7])
def test_scaling_is_of_the_merge_and_of_the_routers(llama_or_gpt2, scaling, groups, wemoes, tmp_path):
    merge(groups(llama_or_gpt2, 3), tmp_path / "merged", "task-arithmetic", scaling=scaling)
    for depth in (0, 1, 2):
        out = wemoes(llama_or_gpt2, scaling=scaling, rank=1000, router_depth=depth, shared_router=depth == 1)
        close(logits(load(out)), logits(plain(tmp_path / "merged")), 1e-5)


def test_the_first_routers_are_the_papers_but_for_the_last_weights(wemoes):
    values = {n: t for n, t in tensors(wemoes(LLAMA)).items() if n.startswith("router.")}
    assert len(values) == 2 * 4
    for name, tensor in values.items():
        hidden, weight = name.split(".")[-2] == "0", name.endswith("weight")
        if hidden and weight:
            assert tensor.shape == (64, 64) and 0.009 < tensor.std() < 0.011 and abs(tensor.mean()) < 0.001
        else:
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if hidden or weight else 0.3)), name
    one, two = (t for n, t in values.items() if n.endswith(".0.weight"))
    assert not torch.equal(one, two)
    other = tensors(wemoes(LLAMA, seed=1))
    assert not any(torch.equal(one, t) for t in other.values())


# ----------------------------------------------------------------------------------------------------- with any routers
ROUTERS = [(0, False), (1, False), (2, False), (1, True), (2, True)]


@pytest.mark.parametrize(
    ("full", "depth", "shared"),
    [
        *((FULL["low-rank"], *router) for router in ROUTERS),
        (FULL["dense"], 2, False),
        (FULL["sparse"], 1, True),
        *((FULL["rank-one"], *router) for router in ROUTERS),
    ],
    ids=lambda value: value["vectors"] if isinstance(value, dict) else str(value),
)
def test_a_routed_model_is_the_papers(llama_or_gpt2, full, depth, shared, groups, wemoes, tmp_path):
    rank = {"rank": 4} if full["vectors"] == "rank-one" else {}
    built = wemoes(llama_or_gpt2, router_depth=depth, shared_router=shared, exact=True, **{**full, **rank})
    out = copied(built, tmp_path / "out")
    values, seen = randomise(out), {}
    assert sum("networks.shared." in name for name in values) == (2 * depth if shared else 0)
    model = reference.of_group(groups(llama_or_gpt2, 3), values, depth, shared, seen=seen, **rank)
    want = logits(model)
    assert len(seen) == 2
    for rows in seen.values():
        assert rows[0].shape == (12, 3 * rank.get("rank", 1))
        assert depth == 0 or len(torch.cat(rows).unique(dim=0)) == 24
    close(logits(load(out)), want)
    assert (want - logits(load(built))).abs().max() > 0.01


def test_terms_are_weighed_by_themselves_up_to_each_experts_rank(wemoes, tmp_path, groups):
    """Experts of rank 2 and 5 and one that changed nothing share a router of 5 terms each."""
    base, changes = LLAMA.model(seed=0), {"thin": 2, "wide": 5, "none": 0}
    save_model(base, tmp_path / "base")
    for name, rank in changes.items():
        generator, tune = torch.Generator().manual_seed(rank), LLAMA.model(seed=0)
        for parameter in (p for n, p in tune.named_parameters() if mlp(n)):
            o, i = parameter.shape
            left, right = (torch.randn(*shape, generator=generator) for shape in ((o, rank), (rank, i)))
            parameter.data += 0.02 * left @ right
        save_model(tune, tmp_path / name)
    group = Group.of(tmp_path / "base", {name: tmp_path / name for name in changes})
    wemoe(group, tmp_path / "out", vectors="rank-one", rank=5, router_depth=1)
    model = load(tmp_path / "out")
    assert model.layout.router["terms"] == 5
    assert {m.ranks for m in model.layout.modules.values()} == {(2, 5, 0)}
    values = randomise(tmp_path / "out")
    close(logits(load(tmp_path / "out")), logits(reference.of_group(group, values, 1, rank=5)))


# ------------------------------------------------------------------------------------- the same, however it is computed
def test_cached_generation_is_that_of_whole_passes(architecture, full, wemoes, tmp_path):
    """From a batch with left padding, against each sequence alone."""
    out = copied(wemoes(architecture, **full), tmp_path / "out")
    randomise(out)
    model = load(out)
    tokens, said = generate(model, *padded(ROWS))
    for n, row in enumerate(ROWS):
        ids = torch.cat([row, tokens[n]])[None]
        whole = logits(model, ids, use_cache=False)[0, len(row) - 1 : -1]
        close(said[n], whole)
        assert torch.equal(tokens[n], whole.argmax(dim=-1))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_model_that_flattens_its_tokens_mixes_no_sequences(depth, wemoes, groups, tmp_path):
    out = copied(wemoes(OPT, router_depth=depth, rank=1000), tmp_path / "out")
    merge(groups(OPT, 3), tmp_path / "merged", "task-arithmetic")
    close(logits(load(out)), logits(plain(tmp_path / "merged")), 1e-5)
    randomise(out)
    model = load(out)
    alone = torch.cat([logits(model, row[None]) for row in IDS])
    close(logits(model), alone)
    close(logits(model, attention_mask=torch.ones_like(IDS)), alone)


# -------------------------------------------------------------------------------------------------------- one fine-tune
def test_one_expert_alone_is_that_fine_tune(llama_or_gpt2, full, tmp_path):
    """Of a group in which only MLPs differ: forced, or chosen by a router that says 1 for it and 0 for the others."""
    weights_only = full["vectors"] == "rank-one"  # biases are merged
    changed = lambda name: mlp(name) and not (weights_only and name.endswith("bias"))  # noqa: E731
    base = save_model(llama_or_gpt2.model(seed=0), tmp_path / "base")
    tunes = {f"e{n}": save_model(perturbed(llama_or_gpt2, n, names=changed), tmp_path / f"tune{n}") for n in (1, 2, 3)}
    wemoe(Group.of(base, tunes), tmp_path / "out", router_depth=0, **full)
    model, want = load(tmp_path / "out"), {name: logits(plain(path)) for name, path in tunes.items()}
    with model.force("base"):
        assert torch.equal(logits(model), logits(plain(base)))
    for number, (name, path) in enumerate(tunes.items()):
        with model.force(name):
            close(logits(model), want[name])
        close(generate(model, IDS, expert=name)[1], generate(plain(path), IDS)[1])
        for parameter in model.router.parameters():
            parameter.data = torch.eye(3)[number].repeat_interleave(len(parameter) // 3)
        close(logits(model), want[name])
    with model.force(["e3", "base"]):
        close(logits(model), torch.stack([want["e3"][0], logits(plain(base))[1]]))


# ----------------------------------------------------------------------------------------------------------- same bytes
def test_the_same_build_gives_the_same_bytes(full, groups, tmp_path, monkeypatch):
    group, options = groups(GPT2, 3), {"seed": 3, **full}
    for name in ("one", "two"):
        wemoe(group, tmp_path / name, **options)
    assert every_file(tmp_path / "one") == every_file(tmp_path / "two")
    monkeypatch.setattr(zoo.writing.writer.Writer.__init__, "__kwdefaults__", {"shard_size": 150_000})
    for name in ("three", "four"):
        wemoe(group, tmp_path / name, **options)
    assert every_file(tmp_path / "three") == every_file(tmp_path / "four")
    assert len(list((tmp_path / "three").glob("model-*.safetensors"))) > 2
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    assert one.keys() == three.keys() and all(torch.equal(t, three[name]) for name, t in one.items())
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "three")))


def test_a_saved_copy_is_the_same_model(full, wemoes, tmp_path):
    out = copied(wemoes(LLAMA, **full), tmp_path / "out")
    randomise(out)
    model = load(out)
    want = logits(model)
    for name, size in (("whole", "1GB"), ("parts", "150KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        again = load(tmp_path / name)
        assert torch.equal(logits(again), want)
        assert again.layout.modules == model.layout.modules and list(again.layout.modules) == list(model.layout.modules)
        randomise(tmp_path / name, seed=1)
        assert not torch.equal(logits(load(tmp_path / name)), want)
    half = load(out, dtype="bfloat16")
    assert {p.dtype for p in half.router.parameters()} == {torch.float32}
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(logits(load(tmp_path / "half")), logits(half))


# ------------------------------------------------------------------------------------------------------------ bad input
def test_a_model_without_mlps_says_what_was_looked_for(groups, tmp_path):
    with pytest.raises(PlanError) as caught:
        wemoe(groups(MAMBA, 2), tmp_path / "out")
    for word in (*MLPS, "--mlp-pattern", "*.mixer.in_proj", "*.mixer.out_proj"):
        assert word in str(caught.value)
    with pytest.raises(PlanError, match=r"no MLP found, looked for linears named \*\.ffn\.up; name them by --mlp-patt"):
        wemoe(groups(LLAMA, 3), tmp_path / "out", mlp_pattern=("*.ffn.up",))
    assert not list(tmp_path.iterdir())


def test_patterns_choose_the_mlps(groups, wemoes, tmp_path):
    same, own = (
        every_file(wemoes(LLAMA, mlp_pattern=given)) for given in (("*.gate_proj", "*.up_proj", "*n_proj"), ())
    )
    assert {**same, "upscale.yaml": own["upscale.yaml"]} == own
    model = load(wemoes(LLAMA, mlp_pattern=("*.1.mlp.down_proj", "*.0.self_attn.?_proj"), rank=1000))
    names = [n.removeprefix("model.layers.") for n in model.layout.modules]
    assert names == [*(f"0.self_attn.{n}_proj" for n in "qkvo"), "1.mlp.down_proj"]
    merge(groups(LLAMA, 3), tmp_path / "merged", "task-arithmetic")
    close(logits(model), logits(plain(tmp_path / "merged")), 1e-5)
    merge(groups(MAMBA, 3), tmp_path / "mamba", "task-arithmetic")
    model = load(wemoes(MAMBA, mlp_pattern=("*.mixer.out_proj",), rank=1000))
    close(logits(model), logits(plain(tmp_path / "mamba")), 1e-5)


WRONG = {
    "depth": (["--router-depth", "3"], "--router-depth must be 0, 1 or 2, not 3"),
    "shared": (["--router-depth", "0", "--shared-router"], "--shared-router needs --router-depth 1 or 2"),
    "no density": (["--density", "0"], "--density must be above 0 and at most 1, not 0.0"),
    "high density": (["--density", "1.5"], "--density must be above 0 and at most 1, not 1.5"),
    "budget": (["--vectors", "dense", "--budget", "2x"], "they need --vectors low-rank"),
    "energy": (["--vectors", "rank-one", "--energy", "0.9"], "they need --vectors low-rank"),
    "vectors": (["--vectors", "few"], "'few' is not one of 'low-rank', 'dense', 'sparse', 'rank-one'"),
    "merge": (["--merge", "dare"], "'dare' is not one of 'task-arithmetic', 'average', 'ties'"),
    "rank": (["--rank", "0"], "--rank must be at least 1, not 0"),
    "pattern": (["--mlp-pattern", "*.nothing"], "no MLP found, looked for linears named *.nothing"),
    "device": (["--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_what_goes_wrong_is_one_message_and_leaves_nothing(options, message, groups, tmp_path):
    result = upscale("wemoe", tmp_path / "out", *inline(groups(LLAMA, 3)), *options)
    assert result.exit_code != 0
    assert_one_message(" ".join(result.output.split()), message)
    assert not list(tmp_path.iterdir())


def test_the_command_builds_what_the_function_builds(groups, wemoes, tmp_path):
    options = ["--vectors", "sparse", "--density", "0.2", "--router-depth", "1", "--shared-router", "--merge", "ties"]
    result = upscale("wemoe", tmp_path / "out", *inline(groups(GPT2, 3)), *options, "--dry-run")
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    result = upscale("wemoe", tmp_path / "out", *inline(groups(GPT2, 3)), *options)
    assert result.exit_code == 0, result.output
    same = wemoes(GPT2, vectors="sparse", density=0.2, router_depth=1, shared_router=True, merge="ties")
    assert every_file(tmp_path / "out") == every_file(same)

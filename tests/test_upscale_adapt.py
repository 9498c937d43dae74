"""`upscale.adapt`: the objective against plain loops, what changes on disk, kills, divergence and mistakes."""

import json
import math
import random
from functools import partial

import pytest
import torch
import yaml

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from tests.cli_runs import upscale as command
from tests.reference.models import generate, logits, tensors
from tests.reference.scoring import ids_of
from tests.routers import copied, give_router, random_router
from upscale import adapt, load
from upscale.adapting import adaptation
from upscale.adapting.objectives import divergence, entropy, per_example
from upscale.config import AdaptConfig, recipe
from upscale.errors import ConfigError, LoadError, TaskError

LLAMA, GPT2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "gpt2"))
QUICK = {"steps": 8, "lr": 0.005, "judge_every": 2, "batch_size": 2, "continuation": 4, "device": "cpu"}
RESTLESS = {"steps": 40, "lr": 0.02, "judge_every": 1, "patience": 2}  # soon too far


DRAW = random.Random(0)
PROMPTS = {
    expert: ["".join(DRAW.choices(letters, k=DRAW.randint(3, 9))) for _ in range(8)]
    for expert, letters in (("e1", "0123456789"), ("e2", "abcdefghij"), ("e3", "QRSTUVWXYZ"))
}


@pytest.fixture
def fresh(wemoes, tmp_path):
    """``fresh(name)``: a checkpoint of its own."""

    def make(name="out", architecture=LLAMA, **options):
        return copied(wemoes(architecture, **options or {"rank": 8, "router_depth": 1}), tmp_path / name)

    return make


def router_of(directory):
    return {n.split(".", 2)[2]: t for n, t in tensors(directory).items() if n.startswith("router.")}


# ---------------------------------------------------------------------------------------------------------- objectives
def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


def entropy_of(row):
    return -sum(p * math.log(p) for p in softmax(row) if p)


def divergence_of(row, teacher):
    return sum(q * (math.log(q) - math.log(p)) for p, q in zip(softmax(row), softmax(teacher), strict=True) if q)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_objectives_are_the_plain_loops(size):
    a, b = size * torch.randn(2, 3, 5, 11, generator=torch.Generator().manual_seed(0))
    want = torch.tensor([[entropy_of(row) for row in rows] for rows in a.tolist()])
    torch.testing.assert_close(entropy(a), want, atol=1e-4, rtol=1e-4)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    want = torch.tensor([[divergence_of(r, t) for r, t in zip(rows, ts, strict=True)] for rows, ts in pairs])
    torch.testing.assert_close(divergence(a, b), want, atol=1e-4, rtol=1e-4)
    assert (divergence(a, b) > 0).all() and torch.equal(divergence(a, a), torch.zeros(3, 5))
    assert entropy(a.bfloat16()).dtype == divergence(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_entropy_is_of_each_prediction_not_of_their_mean():
    """Two sure predictions that differ: nothing to gain, though their mean is as unsure as can be."""
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    torch.testing.assert_close(entropy(sure), torch.zeros(2))
    torch.testing.assert_close(entropy(torch.zeros(4)), torch.tensor(math.log(4)))
    assert torch.isfinite(entropy(torch.tensor([0.0, -1e30, 1e4]))).all()


def test_examples_weigh_the_same_however_many_places_they_have():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    assert per_example(values, mask).tolist() == [2.0, 5.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- training
def held_out(model, objective, answers, count=2):
    """The objective on each expert's first prompts, alone and by loops: mean over tokens, prompts, experts."""
    experts = []
    for expert, given in PROMPTS.items():
        prompts = []
        for prompt, answer in zip(given[:count], answers[expert], strict=True):
            ids = torch.tensor([ids_of(prompt) + answer])
            places = slice(len(ids_of(prompt)) - 1, -1)
            said = logits(model, ids, use_cache=False)[0, places].tolist()
            with model.force(expert):
                teacher = logits(model, ids, use_cache=False)[0, places].tolist()
            both = zip(said, teacher, strict=True)
            values = [divergence_of(*pair) for pair in both] if objective == "distil" else map(entropy_of, said)
            prompts.append(sum(values) / len(answer))
        experts.append(sum(prompts) / len(prompts))
    return sum(experts) / len(experts)


def answered(model, objective, tokens, count=2):
    """Greedy answers, up to the end of sequence: of the expert to learn from, or of the model itself."""
    found = {}
    for expert, given in PROMPTS.items():
        options = {"expert": expert} if objective == "distil" else {}
        found[expert] = []
        for prompt in given[:count]:
            answer = generate(model, torch.tensor([ids_of(prompt)]), max_new_tokens=tokens, **options)[0][0].tolist()
            found[expert].append(answer[: answer.index(1) + 1] if 1 in answer else answer)
    return found


WAYS = {
    "low-rank": (LLAMA, {"rank": 8, "router_depth": 1}),
    "sparse": (LLAMA, {"vectors": "sparse", "router_depth": 2, "shared_router": True}),
    "rank-one": (LLAMA, {"vectors": "rank-one", "rank": 4, "router_depth": 1}),
    "dense": (GPT2, {"vectors": "dense", "router_depth": 0}),
}


@pytest.mark.parametrize("objective", ["distil", "entropy"])
@pytest.mark.parametrize(("architecture", "options"), WAYS.values(), ids=list(WAYS))
def test_the_held_out_objective_falls_by_what_is_reported(architecture, options, objective, fresh):
    out = fresh(architecture=architecture, **options)
    before = load(out)
    answers = answered(before, objective, QUICK["continuation"])
    found = adapt(out, PROMPTS, objective=objective, **{**QUICK, "lr": 0.005 if objective == "distil" else 0.1})
    assert found.stopped == "steps" and found.steps == len(found.training.losses) == 8
    assert [j.step for j in found.training.judgements] == [0, 2, 4, 6, 8]
    first, best = found.training.judgements[0], found.training.best
    assert best.step > 0 and best.loss < first.loss - (0.02 * first.loss if objective == "distil" else 2e-4)
    same = partial(pytest.approx, rel=1e-5, abs=1e-6)
    assert first.loss == same(held_out(before, objective, answers))
    assert best.loss == same(held_out(load(out), objective, answers))
    assert best.entropy == same(held_out(load(out), "entropy", answers))


def test_only_the_router_changes(fresh):
    out = fresh(rank=8, router_depth=2)
    before, values = every_file(out), router_of(out)
    found = adapt(out, PROMPTS, **QUICK, seed=5)
    after, changed = every_file(out), router_of(out)
    named = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    routers = {name for name in named if name.startswith("router-") and name.endswith(".safetensors")}
    assert len(routers) == 2 and len(routers & after.keys()) == 1
    assert named == {*routers, "config.json", "upscale.yaml"}  # the runtime's .py files are of the same version here
    assert values.keys() == changed.keys() and all(not torch.equal(t, changed[n]) for n, t in values.items())
    configs = [json.loads(files["config.json"]) for files in (before, after)]
    names = [config["upscale"]["router"].pop("tensors") for config in configs]
    assert names[0] != names[1] and configs[0] == configs[1]
    story, old = yaml.safe_load(after["upscale.yaml"]), yaml.safe_load(before["upscale.yaml"])
    made = story.pop("router")
    assert story == old and made["steps"] == found.training.best.step and made["prompts"].keys() == PROMPTS.keys()
    assert made["adapted"] == recipe(AdaptConfig(**QUICK, seed=5))


def test_the_same_seed_gives_the_same_router(fresh):
    turned = dict(reversed(PROMPTS.items()))
    for name, seed, given in (("one", 1, PROMPTS), ("two", 1, turned), ("other", 2, PROMPTS)):
        adapt(out := fresh(name), given, **QUICK, seed=seed)
    one, two, other = (every_file(out.with_name(name)) for name in ("one", "two", "other"))
    assert {**one, "upscale.yaml": two["upscale.yaml"]} == two
    assert one["config.json"] != other["config.json"]


def test_training_stops_when_nothing_is_gained(fresh):
    """A rate at which the routers jump about: the best ones stay, and the state of a finished run is not left."""
    found = adapt(out := fresh(), PROMPTS, **{**QUICK, **RESTLESS})
    judged = [j.loss for j in found.training.judgements]
    assert found.stopped == "patience" and found.steps < 40
    assert judged.index(min(judged)) == len(judged) - 3 == found.training.best.step
    assert not list(out.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------- kills
class Killed(BaseException):
    pass


def killed_at(step):
    """A progress callback that ends the run, once."""
    left = [step]

    def progress(done, total, what):
        if left and done == left[0] and (done or what.startswith("answers for e2")):
            left.pop()
            raise Killed

    return progress


@pytest.mark.parametrize("objective", ["distil", "entropy"])
@pytest.mark.parametrize("steps", [(0, 1), (2, 5), (7, 8)])
def test_a_killed_run_goes_on_as_if_undisturbed(steps, objective, fresh):
    settings = {**QUICK, "judge_every": 3, "objective": objective}
    adapt(want := fresh("undisturbed"), PROMPTS, **settings)
    out = fresh("killed")
    before = every_file(out)
    for step in steps:
        with pytest.raises(Killed):
            adapt(out, PROMPTS, **settings, progress=killed_at(step))
        left = every_file(out)
        assert {name: left[name] for name in before} == before
        assert [name for name in left.keys() - before if not name.startswith(".adapt-")] == []
    found = adapt(out, PROMPTS, **settings)
    assert len(found.training.losses) == 8 and [j.step for j in found.training.judgements] == [0, 3, 6, 8]
    assert every_file(out) == every_file(want)


def test_a_run_killed_as_it_loses_patience_has_lost_it(fresh):
    settings = {**QUICK, **RESTLESS}
    undisturbed = adapt(want := fresh("undisturbed"), PROMPTS, **settings)
    out = fresh("killed")
    with pytest.raises(Killed):
        adapt(out, PROMPTS, **settings, progress=killed_at(undisturbed.steps))
    found = adapt(out, PROMPTS, **settings)
    assert (found.stopped, found.steps) == ("patience", undisturbed.steps)
    assert every_file(out) == every_file(want)


# ----------------------------------------------------------------------------------------------------------- divergence
def test_a_huge_rate_diverges_and_changes_nothing(fresh):
    out = fresh()
    before = every_file(out)
    found = adapt(out, PROMPTS, **{**QUICK, "lr": 1e30})
    assert found.stopped == "diverged" and found.training.best.step == 0 and found.steps < 8
    assert every_file(out) == before


def test_diverging_later_keeps_the_best_router(fresh, monkeypatch):
    models, seen = [], {}
    keep = lambda *args, **kwargs: models.append(load(*args, **kwargs)) or models[0]  # noqa: E731
    monkeypatch.setattr(adaptation, "load", keep)

    def progress(done, total, what):
        seen[done] = {name: t.detach().clone() for name, t in models[0].router.named_parameters()}
        if done == 5:  # a step that goes astray
            for parameter in models[0].router.parameters():
                parameter.data *= 1e30

    found = adapt(out := fresh(), PROMPTS, **QUICK, progress=progress)
    assert (found.stopped, found.training.best.step) == ("diverged", 4)
    stored = router_of(out)
    assert stored.keys() == seen[4].keys()
    assert all(torch.equal(t, seen[4][name]) for name, t in stored.items())


# ------------------------------------------------------------------------------------------------------- a SMILE's gate
@pytest.mark.parametrize(("depth", "granularity"), [(0, "prompt"), (0, "prefix"), (1, "prefix")])
def test_a_calibrated_gate_is_adapted_and_keeps_its_top_k(depth, granularity, builds, tmp_path):
    out = copied(builds(LLAMA, 3, rank=16, router_rank=4)[0], tmp_path / "out")
    settings = {"depth": depth, "granularity": granularity, "top_k": 1}
    give_router(out, random_router(64 if depth else 259, depth), **settings)
    before, files = json.loads((out / "config.json").read_text())["upscale"]["router"], every_file(out)
    found = adapt(out, PROMPTS, **{**QUICK, "lr": 0.3})
    first, best = found.training.judgements[0], found.training.best
    assert best.step > 0 and best.loss < 0.9 * first.loss
    model = load(out)
    assert {**model.layout.router, "tensors": 0} == {**before, "tensors": 0}
    assert model.layout.router["tensors"] != before["tensors"]
    assert all(files[name] == content for name, content in every_file(out).items() if name.startswith("model"))
    model.routing.trace = {}
    logits(model, torch.tensor([ids_of("123 abc")]))
    for w in model.routing.trace.values():
        assert ((w != 0).sum(dim=-1) <= 1).all() and set(w.unique().tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------------------------------------------------- mistakes
WRONG = [
    ({"poet": ["a", "b"]}, {}, "prompts for poet: no such expert; the model has e1, e2, e3"),
    ({"e1": None, "e3": None}, {}, "no prompts for e1, e3: every expert needs some"),
    ({"e3": ["Q"]}, {}, r"1 prompt\(s\) for e3: at least 2 are needed"),
    ({"e3": []}, {}, r"0 prompt\(s\) for e3: at least 2 are needed"),
    ({"e2": ["a", "b" * 300]}, {}, "prompt 2 for e2 has 301 tokens; with 4 of an answer it does not fit"),
    ({}, {"lr": 0.0}, "--lr must be more than 0, not 0.0"),
    ({}, {"lr": float("nan")}, "--lr must be more than 0, not nan"),
    ({}, {"steps": 0}, "--steps must be at least 1, not 0"),
    ({}, {"held_out": 1.0}, "--held-out must be at least 0 and less than 1, not 1.0"),
    ({}, {"objective": "labels"}, "--objective must be one of distil, entropy, not 'labels'"),
    ({}, {"prompt_template": "x"}, "does not contain {prompt}"),
    ({}, {"device": "abacus"}, "--device abacus"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), WRONG)
def test_what_is_wrong_is_said_and_nothing_changes(prompts, options, message, fresh):
    out = fresh()
    before = every_file(out)
    with pytest.raises(ConfigError if options else TaskError, match=message):
        adapt(out, {e: p for e, p in {**PROMPTS, **prompts}.items() if p is not None}, **{**QUICK, **options})
    assert every_file(out) == before


def test_what_has_no_router_to_train_is_refused(builds, groups, tmp_path):
    smile = builds(LLAMA, 3, rank=16, router_rank=4)[0]
    with pytest.raises(ConfigError, match="a projection router has nothing to train; calibrate the checkpoint first"):
        adapt(smile, PROMPTS, **QUICK)
    with pytest.raises(LoadError, match="a plain model, which has no router"):
        adapt(groups(LLAMA, 3).base.resolve(), PROMPTS, **QUICK)
    with pytest.raises(LoadError, match="not a directory"):
        adapt(tmp_path / "nowhere", PROMPTS, **QUICK)


def test_the_command_does_what_the_function_does(fresh, tmp_path):
    files = [f"{expert}={tmp_path / expert}.txt" for expert in PROMPTS]
    for expert, given in PROMPTS.items():
        (tmp_path / f"{expert}.txt").write_text("\n".join(given))
    options = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = command("adapt", out := fresh("command"), "--prompts", *files, *options)
    assert result.exit_code == 0, result.output
    found = adapt(same := fresh("function"), PROMPTS, **QUICK)
    assert every_file(out) == every_file(same)
    assert f"kept the routers of step {found.training.best.step}: distil " in result.output
    result = command("adapt", out, "--prompts", *files[:2])
    assert result.exit_code == 1
    assert_one_message(result.output, "no prompts for e3")

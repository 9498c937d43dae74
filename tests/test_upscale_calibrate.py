"""`calibrate`: the router against plain recomputation, the files that change, and what goes wrong."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.architectures import TABLE
from tests.cli_runs import every_file
from tests.reference import discriminant as reference
from tests.reference.models import IDS, close, generate, logits, padded, paths, plain, tensors
from tests.reference.scoring import ids_of
from tests.routers import copied
from upscale import load
from upscale.calibrating import discriminant
from upscale.calibrating.calibration import calibrate
from upscale.config import CalibrateConfig, recipe
from upscale.errors import ConfigError, LoadError, TaskError
from upscale.runtime import runtime_files
from zoo import OutputError

LLAMA, GPT2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "gpt2"))
ALPHABETS = {"e1": "0123456789", "e2": "abcdefghij", "e3": "QRSTUVWXYZ", "base": "+-*/=<>()?"}


def texts(seed, count=5, names=tuple(ALPHABETS)):
    """Random texts of different length, each of one class's letters."""
    draw = random.Random(seed)
    return {
        name: ["".join(draw.choices(ALPHABETS[name], k=draw.randint(9, 30))) for _ in range(count)] for name in names
    }


EXPERTS = ("e1", "e2", "e3")
PROMPTS = texts(0, names=EXPERTS)


@pytest.fixture
def fresh(builds, tmp_path):
    """``fresh(architecture)``: a checkpoint of its own."""

    def make(architecture=LLAMA, name="model", **options):
        return copied(builds(architecture, 3, **options or {"rank": 16, "router_rank": 4})[0], tmp_path / name)

    return make


def chosen(model, given):
    """The class that each text goes to, all in one batch with left padding."""
    ids, mask = padded([torch.tensor(ids_of(text)) for text in given])
    model.routing.trace = {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    (w,) = torch.stack([w[:, -1] for w in model.routing.trace.values() if w.shape[0] == len(given)]).unique(dim=0)
    model.routing.trace = None
    return [next((e for e, x in zip(model.routing.experts, row, strict=True) if x), "base") for row in w]


def router_of(directory):
    settings = json.loads((directory / "config.json").read_text())["upscale"]["router"]
    stored = {name: t for name, t in tensors(directory).items() if name.startswith(f"{settings['tensors']}.")}
    return settings, {name.rpartition(".")[2]: t for name, t in stored.items()}


# --------------------------------------------------------------------------------------------------------- what it does
@pytest.mark.parametrize("given_base", [True, False])
def test_unseen_prompts_go_to_their_expert_and_others_to_none(architecture, fresh, given_base):
    directory = fresh(architecture)
    given = texts(0) if given_base else PROMPTS
    found = calibrate(directory, given, samples=24)
    assert list(found.classes) == [*EXPERTS, "base"]
    assert found.accuracy.keys() == found.confidence.keys() == set(found.classes)
    assert {name: found.accuracy[name] for name in EXPERTS} == dict.fromkeys(EXPERTS, 1.0)
    assert found.accuracy["base"] >= 0.75
    assert found.texts == {**dict.fromkeys(EXPERTS, 5), "base": 5 if given_base else 24}
    assert (found.depth, found.held_out) == (0, None)
    model = load(directory)
    for name in EXPERTS:
        assert chosen(model, texts(1, 8)[name]) == [name] * 8
    if given_base:
        assert chosen(model, texts(1, 8)["base"]) == ["base"] * 8


def unit(hidden):
    return hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-9)  # a padding token's row is 0


def running(x, half_life):
    """Means [T, d] of ``x`` [T, d] over each token's prefix; tokens count half for every ``half_life`` after them."""
    means = []
    for now in range(len(x)):
        ages = torch.arange(now, -1, -1).double()
        share = torch.ones(now + 1).double() if half_life is None else 0.5 ** (ages / half_life)
        means.append((share / share.sum()) @ x[: now + 1])
    return torch.stack(means)


def assert_is_the_reference(rows, score_of):
    """``rows``: (sample, class, text) in order; ``score_of(sample)``: logits by the stored router."""
    x, classes, groups = ([row[n] for row in rows] for n in range(3))
    constants = (discriminant.SHRINKAGE, discriminant.SHARPNESS, discriminant.MISSED, discriminant.SHARE)
    _, _, _, score = reference.fit(x, classes, groups, 3, *constants)
    for sample in x[::3]:
        want = torch.tensor(score(sample)).log_softmax(dim=0)
        torch.testing.assert_close(score_of(sample).double().log_softmax(dim=0), want.double(), atol=2e-3, rtol=1e-3)


def samples(given, framed, hidden_of, half_life, answers=None):
    """Of every text the running means after the prompt and after 1, 2, 4, 8 tokens of its answer; of the base's texts
    the end, and those after 4, 8, 16, 32, 64 tokens."""
    rows, number = [], 0
    for label, (name, of_class) in enumerate(given.items()):
        for text in of_class:
            ids = ids_of(framed(text))
            answer = answers(name, ids) if answers and name != "base" else []
            means = running(hidden_of(ids + answer).double(), half_life)
            if name == "base":
                places = [len(ids) - 1, *(n - 1 for n in (4, 8, 16, 32, 64) if n < len(ids))]
            else:
                places = [len(ids) - 1 + n for n in (0, 1, 2, 4, 8, 16) if n <= len(answer)]
            rows += [(means[place], label, number) for place in places]
            number += 1
    return rows


FRAMES = {
    "plain": ({}, lambda text: text),
    "decayed": ({"half_life": 5.0, "prompt_template": "Q: {prompt}\\nA:\\t"}, lambda text: f"Q: {text}\nA:\t"),
    "chat": ({"chat": True}, lambda text: f"{text}\n"),  # the demo zoo's template
}


@pytest.mark.parametrize(
    ("architecture", "frame"),
    [*((a, "plain") for a in TABLE), (LLAMA, "decayed"), (LLAMA, "chat")],
    ids=lambda value: getattr(value, "name", value),
    indirect=["architecture"],
)
def test_the_table_is_the_plain_fit_of_mean_embeddings(architecture, groups, fresh, frame):
    options, framed = FRAMES[frame]
    directory, given = fresh(architecture), texts(0)
    calibrate(directory, given, **options)
    settings, stored = router_of(directory)
    half_life = options.get("half_life")
    assert settings == {
        **{"type": "calibrated", "experts": 3, "size": 259, "depth": 0, "granularity": "prompt", "base": True},
        **{"top_k": 1, "half_life": half_life, "tensors": settings["tensors"]},
    }
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        "table": ((259, 4), torch.float32),
        "bias": ((4,), torch.float32),
    }
    embeddings = unit(plain(paths(groups(architecture, 3))[0]).get_input_embeddings().weight.detach().double())
    rows = samples(given, framed, embeddings.__getitem__, half_life)
    # What a token scores is linear in its embedding.
    weight = torch.linalg.lstsq(embeddings, stored["table"].double()).solution
    torch.testing.assert_close(embeddings @ weight, stored["table"].double(), atol=1e-3, rtol=1e-3)
    assert_is_the_reference(rows, lambda x: x @ weight + stored["bias"])


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name, indirect=True)
@pytest.mark.parametrize("half_life", [None, 6.0])
def test_a_later_depth_is_fitted_on_what_the_base_makes_of_prompts_and_answers(architecture, groups, fresh, half_life):
    """Answers are the fine-tunes' own greedy ones; modules before the depth are the base's."""
    directory, given = fresh(architecture, rank=1000), texts(0, 4)
    options = {"granularity": "prefix", "depth": 1, "continuation": 9, "half_life": half_life}
    found = calibrate(directory, given, **options)
    assert found.depth == 1 and [d.depth for d in found.depths] == [0, 1]
    settings, stored = router_of(directory)
    assert (settings["depth"], settings["granularity"], settings["size"]) == (1, "prefix", stored["weight"].shape[1])
    base, experts = paths(groups(architecture, 3))
    reader, tunes = plain(base), {name: plain(path) for name, path in experts.items()}

    @torch.no_grad()
    def hidden_of(ids):
        return unit(reader(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0])

    def answers(name, ids):
        said = generate(tunes[name], torch.tensor([ids]), max_new_tokens=9)[0][0].tolist()
        return said[: next((n for n, token in enumerate(said) if token in (1, 2)), 9)]

    rows = samples(given, str, hidden_of, half_life, answers)
    assert len(rows) > 3 * 4 * 3
    assert_is_the_reference(rows, lambda x: stored["weight"].double() @ x + stored["bias"])


def test_the_router_that_is_written_is_the_one_that_runs(fresh):
    """Posterior of the prompt's mean, by the stored tensors."""
    directory = fresh()
    calibrate(directory, texts(0), top_k=0)
    _, stored = router_of(directory)
    model = load(directory)
    model.routing.trace = {}
    logits(model)
    means = torch.stack([stored["table"][row].mean(dim=0) for row in IDS])
    want = (means + stored["bias"]).softmax(dim=-1)[:, :3]
    for w in model.routing.trace.values():
        close(w, want[:, None].expand(-1, IDS.shape[1], -1), 1e-5)


def test_options_decide_what_is_written(fresh):
    directory = fresh()
    found = calibrate(directory, PROMPTS, CalibrateConfig(no_base=True, top_k=2, granularity="prefix", continuation=3))
    settings, stored = router_of(directory)
    assert list(found.classes) == [*EXPERTS]
    assert (settings["base"], settings["top_k"], settings["granularity"]) == (False, 2, "prefix")
    assert len(stored["bias"]) == 3
    model = load(directory)
    model.routing.trace = {}
    logits(model)
    for w in model.routing.trace.values():
        assert set((w > 0).sum(dim=-1).unique().tolist()) <= {1, 2}
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(w.shape[:-1]))
    made = yaml.safe_load((directory / "upscale.yaml").read_text())
    assert made["method"] == "smile" and made["config"]["rank"] == 16
    assert made["router"]["calibrated"] == recipe(
        CalibrateConfig(no_base=True, top_k=2, granularity="prefix", continuation=3)
    )
    assert made["router"]["prompts"].keys() == set(EXPERTS)
    calibrate(directory, {**PROMPTS, "e1": texts(9)["e1"]}, no_base=True)
    again = yaml.safe_load((directory / "upscale.yaml").read_text())["router"]["prompts"]
    assert [again[name] == made["router"]["prompts"][name] for name in EXPERTS] == [False, True, True]


def test_a_base_that_writes_what_the_prompts_look_like_has_no_class(fresh):
    """Else it would take its expert's prompts; given as prompts, the base's texts count as they are."""
    directory = fresh()
    model = load(directory)
    start = torch.randint(3, 259, (6, 1), generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        written = model.generate(
            input_ids=start, max_new_tokens=40, do_sample=True, top_k=0, expert="base", pad_token_id=2
        )
    like = [bytes(token - 3 for token in row.tolist() if token > 2).decode(errors="replace") for row in written]
    prompts = {**PROMPTS, "e1": like}
    found = calibrate(directory, prompts, samples=32)
    assert list(found.classes) == [*EXPERTS]
    assert router_of(directory)[0]["base"] is False
    assert "base" not in found.accuracy and "base" not in found.texts
    found = calibrate(directory, {**prompts, "base": texts(0)["base"]})
    assert list(found.classes) == [*EXPERTS, "base"]


def test_without_prompts_the_experts_write_their_own(fresh):
    one, two = fresh(), fresh(name="two")
    steps = []
    found = calibrate(one, None, samples=8, progress=lambda *step: steps.append(step))
    assert found.held_out is not None
    assert found.held_out.keys() == found.accuracy.keys() == set(found.classes)
    assert {found.texts[name] for name in EXPERTS} == {6}  # of four one is held out
    assert all(0 <= share <= 1 for share in found.held_out.values())
    assert [done for done, _, _ in steps] == list(range(1, 33))
    assert {total for _, total, _ in steps} == {32}
    calibrate(two, None, samples=8)
    assert every_file(one) == every_file(two)
    assert yaml.safe_load((one / "upscale.yaml").read_text())["router"]["prompts"] == "written by the experts"


# ------------------------------------------------------------------------------------------------------------ the files
def test_only_the_routers_file_and_the_configuration_change(fresh):
    directory = fresh()
    (directory / "modeling_upscaled.py").write_text("raise SystemError('old')\n")
    before = every_file(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        calibrate(directory, PROMPTS, samples=8)
    after = every_file(directory)
    (router,) = after.keys() - before.keys()
    assert router.startswith("router-") and not before.keys() - after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "upscale.yaml", "README.md", "modeling_upscaled.py"}
    assert {n: after[n] for n in runtime_files()} == {n: f.read_bytes() for n, f in runtime_files().items()}
    was, now = (json.loads(files["config.json"]) for files in (before, after))
    was["upscale"].pop("router"), now["upscale"].pop("router")
    assert was == now
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)  # the global generator has no part in it
        calibrate(directory, PROMPTS, samples=8)
    assert every_file(directory) == after
    calibrate(directory, texts(5), samples=8)
    assert len(every_file(directory)) == len(after) and router not in every_file(directory)


def sharded(directory, out):
    """The same checkpoint in shards, with an index."""
    load(directory).save_pretrained(out, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, out / name)
    assert len(list(out.glob("model-*"))) > 1
    return out


def test_shards_are_not_touched_and_route_alike(fresh, tmp_path):
    whole = fresh()
    parts = sharded(whole, tmp_path / "parts")
    before = every_file(parts)
    for directory in (whole, parts):
        calibrate(directory, PROMPTS, samples=8)
    assert torch.equal(logits(load(parts)), logits(load(whole)))
    after = every_file(parts)
    assert all(after[name] == data for name, data in before.items() if name.endswith("safetensors"))
    again = sharded(parts, tmp_path / "again")  # saved with its router, and calibrated anew
    assert torch.equal(logits(load(again)), logits(load(whole)))
    for directory in (whole, again):
        calibrate(directory, texts(3), samples=8)
    assert torch.equal(logits(load(again)), logits(load(whole)))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("damage", [Path.unlink, truncated], ids=["missing", "truncated"])
def test_a_damaged_router_is_refused_and_calibrated_again(fresh, tmp_path, shards, damage):
    directory = sharded(fresh(), tmp_path / "parts") if shards else fresh()
    calibrate(directory, PROMPTS, samples=8)
    fine = every_file(directory)
    (file,) = directory.glob("router-*.safetensors")
    damage(file)
    with pytest.raises(LoadError) as error:
        load(directory)
    assert "\n" not in str(error.value)
    calibrate(directory, PROMPTS, samples=8)
    assert every_file(directory) == fine


def test_a_missing_router_tensor_is_named_with_the_remedy(fresh):
    directory = fresh()
    calibrate(directory, PROMPTS, samples=8)
    names = router_of(directory)[0]["tensors"]
    next(directory.glob("router-*")).unlink()
    with pytest.raises(LoadError, match=rf"tensor {names}.table is missing; calibrate the checkpoint again"):
        load(directory)


def test_a_router_of_an_unknown_kind_is_replaced(fresh):
    directory = fresh()
    config = json.loads((directory / "config.json").read_text())
    config["upscale"]["router"] = {"type": "oracle", "wisdom": 1}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="router 'oracle' is unknown"):
        load(directory)
    calibrate(directory, PROMPTS, samples=8)
    assert chosen(load(directory), PROMPTS["e2"]) == ["e2"] * 5


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_killed_before_the_configuration_is_renamed_the_old_router_runs_and_after_it_the_new(fresh, monkeypatch, after):
    directory = fresh()
    calibrate(directory, PROMPTS, samples=8)
    old = logits(load(directory))
    rename = Path.rename

    def stop(path, target):
        if Path(target).name == "config.json":
            if after:
                rename(path, target)
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", stop)
        calibrate(directory, texts(2), samples=8)
    got = logits(load(directory))
    calibrate(directory, texts(2), samples=8)
    new = logits(load(directory))
    assert not torch.equal(old, new)
    assert torch.equal(got, new if after else old)
    assert len(list(directory.glob("router-*"))) == 1


# ------------------------------------------------------------------------------------------------------ what goes wrong
LONG = {**PROMPTS, "e2": ["short", "x" * 260]}
MISTAKES = {
    "one prompt": (
        {**PROMPTS, "e2": ["one"]},
        {},
        TaskError,
        "1 prompt(s) for e2: at least 2 are needed, 4 to 16 are advised",
    ),
    "no prompts": ({**PROMPTS, "e1": []}, {}, TaskError, "0 prompt(s) for e1: at least 2 are needed"),
    "one base text": ({**PROMPTS, "base": ["a"]}, {}, TaskError, "1 prompt(s) for base: at least 2 are needed"),
    "unknown expert": (
        {**PROMPTS, "e9": ["a", "b"]},
        {},
        TaskError,
        "prompts for e9: no such expert; the model has e1, e2, e3 and base",
    ),
    "missing experts": ({"e2": ["a", "b"]}, {}, TaskError, "no prompts for e1, e3: every expert needs some"),
    "too long": (
        LONG,
        {},
        TaskError,
        "prompt 2 for e2 has 261 tokens, which does not fit the model's context of 256; shorten it",
    ),
    "no room to answer": (
        {**PROMPTS, "e2": ["x" * 250, "y"]},
        {"granularity": "prefix"},
        TaskError,
        "prompt 1 for e2 has 251 tokens; with 32 of an answer, which does not fit the model's context of 256",
    ),
    "top_k": (PROMPTS, {"top_k": 5}, ConfigError, "--top-k 5 is more than the router's 4 classes"),
    "top_k without base": (
        PROMPTS,
        {"top_k": 4, "no_base": True},
        ConfigError,
        "--top-k 4 is more than the router's 3 classes",
    ),
    "depth": (PROMPTS, {"granularity": "prefix", "depth": 2}, ConfigError, "--depth 2: the model has depths 0 to 1"),
    "depth of prompts": (PROMPTS, {"depth": 1}, ConfigError, "--depth needs --granularity prefix"),
    "negative depth": (
        PROMPTS,
        {"depth": -1, "granularity": "prefix"},
        ConfigError,
        "--depth must be at least 0, not -1",
    ),
    "half-life": (PROMPTS, {"half_life": 0.0}, ConfigError, "--half-life must be more than 0 tokens, not 0.0"),
    "endless half-life": (
        PROMPTS,
        {"half_life": float("inf")},
        ConfigError,
        "--half-life must be more than 0 tokens, not inf",
    ),
    "samples": (None, {"samples": 2}, ConfigError, "--samples must be at least 4, not 2"),
    "granularity": (
        PROMPTS,
        {"granularity": "token"},
        ConfigError,
        "--granularity must be one of prompt, prefix, not 'token'",
    ),
    "template": (
        PROMPTS,
        {"prompt_template": "none"},
        ConfigError,
        "--prompt-template 'none' does not contain {prompt}",
    ),
    "device": (PROMPTS, {"device": "nonsense"}, ConfigError, "--device nonsense: "),
}


@pytest.mark.parametrize(("prompts", "options", "kind", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_typed_line_and_nothing_changes(fresh, prompts, options, kind, message):
    directory = fresh()
    before = every_file(directory)
    with pytest.raises(kind) as error:
        calibrate(directory, prompts, **{"samples": 4, **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert every_file(directory) == before


def test_what_is_no_upscaled_directory_is_refused(fresh, groups, tmp_path):
    base, _ = paths(groups(LLAMA, 3))
    for path, message in (
        ("org/model", "org/model: not a directory; a model of the Hub must be downloaded first"),
        (tmp_path / "absent", "absent: not a directory"),
        (base, "base: a plain model, which has no router; give an upscaled one"),
        (tmp_path, "not a model directory (no config.json)"),
    ):
        with pytest.raises(LoadError) as error:
            calibrate(path, PROMPTS)
        assert message in str(error.value) and "\n" not in str(error.value)
    directory = fresh()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(LoadError, match="no usable tokenizer"):
        calibrate(directory, PROMPTS)
    assert not list(directory.glob("router-*"))


def test_a_format_that_is_not_known_is_refused(fresh):
    directory = fresh()
    config = json.loads((directory / "config.json").read_text())
    config["upscale"]["format_version"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="model: format version 2 of the upscaled checkpoint is not 1; update"):
        calibrate(directory, PROMPTS)


def test_a_directory_that_cannot_be_written_is_left_alone(fresh):
    directory = fresh()
    (directory / ".config.json.partial").mkdir()
    with pytest.raises(OutputError, match="model: cannot be written: Is a directory"):
        calibrate(directory, PROMPTS, samples=4)
    assert load(directory).layout.router["type"] == "projection"

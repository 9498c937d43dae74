"""Upscaled checkpoints in transformers over the architecture table: load, generate, force, save, fail."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import TABLE
from tests.reference.models import GREEDY, IDS, close, dense, generate, logits, padded, paths, plain, tensors
from tests.routers import copied, give_router, random_router
from upscale import load
from upscale.errors import LoadError
from upscale.runtime.modeling_upscaled import UpscaledModel
from zoo import SourceError


@pytest.fixture
def upscaled(architecture, builds):
    """A fresh float32 model of three experts, top-2: routing that mixes."""
    return load(builds(architecture, 3, rank=16, router_rank=4, top_k=2)[0])


def test_cached_decoding_equals_full_passes(upscaled):
    tokens, cached = generate(upscaled, IDS)
    without, full = generate(upscaled, IDS, use_cache=False)
    assert torch.equal(tokens, without)
    close(cached, full)
    whole = logits(upscaled, torch.cat([IDS, tokens], dim=1))
    close(cached, whole[:, IDS.shape[1] - 1 : -1])


def test_a_left_padded_batch_equals_single_sequences(upscaled):
    rows = [IDS[0, :5], IDS[1], IDS[0, 3:11]]
    tokens, together = generate(upscaled, *padded(rows))
    for n, row in enumerate(rows):
        alone, single = generate(upscaled, row[None])
        assert torch.equal(tokens[n], alone[0])
        close(together[n], single[0])


def test_bfloat16_is_near_float32(architecture, builds):
    out, _ = builds(architecture, 3, rank=16, router_rank=4, top_k=3)  # soft routing: no choice to flip
    full, half = load(out), load(out, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    want, got = logits(full), logits(half)
    assert (got - want).norm() <= 0.03 * want.norm()
    generate(half, IDS)


def test_gradients_reach_the_experts_and_only_when_asked(upscaled):
    with torch.no_grad():
        assert not upscaled(input_ids=IDS).logits.requires_grad
    upscaled(input_ids=IDS, labels=IDS).loss.backward()
    for name, layout in upscaled.layout.modules.items():
        for tensor, parameter in upscaled.get_submodule(name).experts.named_parameters():
            reached = layout.kind == "linear" or name in {m.tied for m in upscaled.layout.modules.values()}
            assert bool(parameter.grad.any()) == reached, (name, tensor)  # the projection router leaves the rest idle
    upscaled.zero_grad()
    with upscaled.force(["e1", "e3"]):
        upscaled(input_ids=IDS, labels=IDS).loss.backward()
        for name in upscaled.layout.modules:
            for tensor, parameter in upscaled.get_submodule(name).experts.named_parameters():
                assert_slope(upscaled, parameter, f"{name}.{tensor}")


def assert_slope(model, parameter, name):
    """The largest gradient of a parameter is the difference quotient."""
    at = int(parameter.grad.abs().argmax())
    gradient, step, flat = float(parameter.grad.view(-1)[at]), 3e-3, parameter.data.view(-1)
    losses = []
    for sign in (1, -1):
        flat[at] += sign * step
        with torch.no_grad():
            losses.append(float(model(input_ids=IDS, labels=IDS).loss))
        flat[at] -= sign * step
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient, rel=0.1), name


def test_forcing_by_context_by_generate_and_at_load(architecture, groups, builds):
    out, _ = builds(architecture, 3, rank=1000, rest="base")
    model = load(out)
    routed = logits(model)
    base, experts = paths(groups(architecture, 3))
    for name, path in {**experts, "base": base}.items():
        reference = plain(base) if name == "base" else dense(base, path)
        want, want_logits = generate(reference, IDS)
        tokens, got_logits = generate(model, IDS, expert=name)
        assert torch.equal(tokens, want)
        close(got_logits, want_logits)
        with model.force(name):
            close(logits(model), logits(reference))
    close(logits(load(out, expert="e2")), logits(dense(base, experts["e2"])))
    assert torch.equal(logits(model), routed), "forcing must end with its context"


def test_forcing_ends_when_generate_fails(upscaled):
    before = logits(upscaled)
    with pytest.raises(ValueError, match="no expert nobody in this model; it has e1, e2, e3 and base"):
        upscaled.generate(input_ids=IDS, expert="nobody")
    with pytest.raises(ZeroDivisionError), upscaled.force("e1"):
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="3 experts are forced, one per sequence; they do not fit 2 sequences"):
        upscaled.generate(input_ids=IDS, expert=["e1", "e2", "e3"], max_new_tokens=2)
    assert torch.equal(logits(upscaled), before)


@pytest.mark.parametrize("beams", [1, 2])
def test_each_sequence_of_a_batch_has_its_own_expert(upscaled, beams):
    rows, names = [IDS[0, :7], IDS[1], IDS[1, 2:9], IDS[0]], ["e3", "base", "e1", "e2"]
    ids, mask = padded(rows)
    options = {"output_logits": False, "return_dict_in_generate": False, "num_beams": beams}
    together = upscaled.generate(input_ids=ids, attention_mask=mask, expert=names, **GREEDY | options)
    for n, (row, name) in enumerate(zip(rows, names, strict=True)):
        alone = upscaled.generate(
            input_ids=row[None], attention_mask=torch.ones(1, len(row)).long(), expert=name, **GREEDY | options
        )
        assert together[n, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_a_deep_copy_routes_on_its_own(upscaled):
    twin = copy.deepcopy(upscaled)
    assert twin.routing is not upscaled.routing
    want = logits(upscaled)
    assert torch.equal(logits(twin), want)
    with twin.force("e1"):
        assert not torch.equal(logits(twin), want)
        assert torch.equal(logits(upscaled), want)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(logits(upscaled), want)


@pytest.mark.parametrize("head", [False, True])
def test_saving_and_loading_changes_nothing(architecture, builds, tmp_path, head):
    out, _ = builds(architecture, 2, rank=16, lm_head=head)
    model = load(out)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again).__name__ == type(model).__name__
    assert again.layout == model.layout
    assert torch.equal(logits(again), logits(model))
    one, two = tensors(out), tensors(tmp_path / "saved")
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    first, second = (json.loads((d / "config.json").read_text()) for d in (out, tmp_path / "saved"))
    for key in ("model_type", "base_model_type", "architectures", "auto_map", "upscale"):
        assert first[key] == second[key]
    assert (tmp_path / "saved/modeling_upscaled.py").read_bytes() == (out / "modeling_upscaled.py").read_bytes()


REMOTE = """
import sys
for name in ("upscale", "zoo", "serving"):
    sys.modules[name] = None  # the package is not installed
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
ids = torch.load("ids.pt")
for name in sys.argv[1:]:
    for loader in (AutoConfig, AutoModelForCausalLM):
        try:
            loader.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            assert "upscaled" in str(error) or "trust_remote_code" in str(error), error
        else:
            raise SystemExit(f"{name} loaded as something else")
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__name__.startswith("Upscaled"), type(model)
    AutoTokenizer.from_pretrained(name, trust_remote_code=True)("text")
    with torch.no_grad(), model.force("e2"):
        forced = model(input_ids=ids).logits
    with torch.no_grad():
        torch.save((model(input_ids=ids).logits, forced), f"{name}.pt")
"""


def test_without_the_package_it_fails_loudly_or_runs_by_remote_code(builds, tmp_path):
    """One process without the package for the whole table; each checkpoint is a copy, away from the repository."""
    names = [architecture.name for architecture in TABLE]
    for architecture in TABLE:
        shutil.copytree(builds(architecture, 2, rank=16)[0], tmp_path / architecture.name)
    gate = random_router(259, classes=3)
    for granularity in ("prompt", "prefix"):
        give_router(copied(builds(TABLE[0], 2, rank=16)[0], tmp_path / granularity), gate, granularity=granularity)
        names.append(granularity)
    torch.save(IDS, tmp_path / "ids.pt")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *names], cwd=tmp_path, env=env, check=True, stdin=subprocess.DEVNULL
    )
    for name in names:
        model = load(tmp_path / name)
        routed, forced = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(routed, logits(model))
        with model.force("e2"):
            assert torch.equal(forced, logits(model))


def test_a_plain_model_loads_as_itself(architecture, groups):
    base = groups(architecture, 2).base.resolve()
    model = load(base)
    assert not isinstance(model, UpscaledModel)
    assert torch.equal(logits(model), logits(plain(base)))
    with pytest.raises(LoadError, match="no experts to choose 'e1' from; it is a plain model"):
        load(base, expert="e1")


def edited(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["upscale"])
    (directory / "config.json").write_text(json.dumps(config))


def rewritten(directory: Path, change) -> None:
    content = load_file(directory / "model.safetensors")
    change(content)
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})


def truncated(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


UP, NORM = "model.layers.1.mlp.up_proj.experts.up", "model.norm.weight"
SCALE, ROWS = "model.norm.experts.scale", "model.embed_tokens.experts.up"
TENSORS = {  # what happens to the tensors, and what the error says
    "expert_missing": (lambda t: t.pop(UP), f"{UP} is missing"),
    "expert_shape": (lambda t: t.update({UP: t[UP][:, 1:].clone()}), rf"{UP} has shape \(96, 47\)"),
    "norm_missing": (lambda t: t.pop(SCALE), f"tensor {SCALE} is missing; build the checkpoint again"),
    "rows_missing": (lambda t: t.update({ROWS: t[ROWS][1:].clone()}), rf"{ROWS} has shape \(258, 48\)"),
    "base_missing": (lambda t: t.pop(NORM), NORM),
    "base_shape": (lambda t: t.update({NORM: torch.ones(3)}), NORM),
}
SECTIONS = {
    "version": (lambda u: u.update(format_version=2), "format version 2 .* is not 1; update"),
    "router": (lambda u: u["router"].update(type="oracle"), "router 'oracle' is unknown.*projection"),
}
BROKEN = {
    "no_config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), "no weights .neither model.safetensors nor"),
    "truncated": (truncated, "incomplete metadata"),
    "garbled": (lambda d: (d / "config.json").write_text("{"), "Expecting"),
    **{kind: (partial(rewritten, change=change), says) for kind, (change, says) in TENSORS.items()},
    **{kind: (partial(edited, change=change), says) for kind, (change, says) in SECTIONS.items()},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(builds, tmp_path, kind):
    directory = tmp_path / "copy"
    shutil.copytree(builds(TABLE[0], 3, rank=16)[0], directory)
    damage, message = BROKEN[kind]
    damage(directory)
    with pytest.raises(LoadError, match=message) as error:
        load(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_experts_and_directories_are_refused(builds, tmp_path):
    with pytest.raises(LoadError, match="no expert nobody in this model; it has e1, e2, e3 and base"):
        load(builds(TABLE[0], 3, rank=16)[0], expert="nobody")
    with pytest.raises(SourceError):
        load(tmp_path / "nowhere")


def test_a_tensor_that_the_base_class_does_not_know_is_passed_over(builds, tmp_path):
    """As the base class itself does, and with it a group whose base has one."""
    out = builds(TABLE[0], 3, rank=16)[0]
    directory = tmp_path / "copy"
    shutil.copytree(out, directory)
    rewritten(directory, change=lambda t: t.update({"model.more": torch.ones(3)}))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(load(directory)(ids).logits, load(out)(ids).logits)

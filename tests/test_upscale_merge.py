"""Dense merges against plain sums, bit for bit where float32 allows."""

import json
import pkgutil

import pytest
import torch

import upscale
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference.models import IDS, logits, paths, plain, tensors
from upscale import load, merge
from upscale.errors import ConfigError
from upscale.modeling_upscaled import UpscaledModel
from zoo import Group, GroupError, MismatchError, OutputError


def merged(base, tunes, method, scaling):
    """Every tensor: the mean of the experts' in double, or base + scaling * sum of deltas."""
    for name, was in base.items():
        stacked = torch.stack([tune[name] for tune in tunes]).double()
        yield name, stacked.mean(dim=0) if method == "average" else was + scaling * (stacked - was.double()).sum(dim=0)


@pytest.mark.parametrize(("method", "scaling"), [("average", 0.3), ("task-arithmetic", 0.3), ("task-arithmetic", 1.0)])
def test_merge_is_the_plain_sum(architecture, groups, tmp_path, method, scaling):
    group = groups(architecture, 3)
    base, experts = paths(group)
    merge(group, tmp_path / "out", method, scaling=scaling)
    got = tensors(tmp_path / "out")
    want = dict(merged(tensors(base), [tensors(path) for path in experts.values()], method, scaling))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), tensor, atol=1e-6, rtol=1e-6)
    model = load(tmp_path / "out")
    assert not isinstance(model, UpscaledModel)
    assert torch.equal(logits(model), logits(plain(tmp_path / "out")))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((base / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_one_expert_is_returned_by_either_method(architecture, groups, tmp_path):
    base, experts = paths(groups(architecture, 1))
    merge(groups(architecture, 1), tmp_path / "average")
    merge(groups(architecture, 1), tmp_path / "sum", "task-arithmetic", scaling=1.0)
    merge(groups(architecture, 1), tmp_path / "none", "task-arithmetic", scaling=0.0)
    tune = tensors(experts["e1"])
    for out in ("average", "sum"):
        for name, tensor in tensors(tmp_path / out).items():
            torch.testing.assert_close(tensor, tune[name], atol=1e-6, rtol=1e-6)
    for name, tensor in tensors(tmp_path / "none").items():
        assert torch.equal(tensor, tensors(base)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_half_sources_are_summed_in_float32_and_rounded_once(tmp_path, dtype, method):
    llama = TABLE[0]
    base = save_model(llama.model(0).to(dtype), tmp_path / "base")
    tunes = {f"e{n}": save_model(perturbed(llama, n).to(dtype), tmp_path / f"e{n}") for n in (1, 2, 3)}
    tunes["wide"] = save_model(perturbed(llama, 4), tmp_path / "wide")  # a float32 expert of a half base
    merge(Group.of(base, tunes), tmp_path / "out", method)
    got, was = tensors(tmp_path / "out"), tensors(base)
    for name, want in merged(was, [tensors(path) for path in tunes.values()], method, 0.3):
        assert got[name].dtype == dtype
        nearest = want.to(dtype)
        ulp = (torch.nextafter(nearest.abs(), torch.tensor(torch.inf, dtype=dtype)) - nearest.abs()).double()
        assert ((got[name].double() - want).abs() <= 0.5 * ulp + 1e-6).all(), name
        assert (got[name] == nearest).float().mean() > 0.995, name
    assert torch.isfinite(logits(load(tmp_path / "out"), IDS)).all()


def test_the_same_bytes_twice(groups, tmp_path):
    for out in ("one", "two"):
        merge(groups(TABLE[1], 3), tmp_path / out)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_a_user_can_get_wrong(groups, tmp_path):
    group = groups(TABLE[0], 2)
    with pytest.raises(ConfigError, match="'median' is unknown; there are average, task-arithmetic"):
        merge(group, tmp_path / "out", "median")
    with pytest.raises(GroupError):
        merge(tmp_path / "absent.yaml", tmp_path / "out")
    with pytest.raises(MismatchError):
        merge(Group.of(group.base.resolve(), {"x": groups(TABLE[1], 2).base.resolve()}), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge(group, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_no_module_hides_a_public_function():
    """``upscale.merge`` must be the function, whichever submodule was imported before."""
    modules = {module.name for module in pkgutil.iter_modules(upscale.__path__)}
    assert not modules & set(upscale.__all__)
    assert all(callable(getattr(upscale, name)) for name in upscale.__all__)

"""Dense merges against plain sums, bit for bit where float32 allows; TIES against the paper's algorithm."""

import json
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upscale
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference import ties as reference
from tests.reference.models import IDS, logits, paths, plain, tensors
from upscale import load, merge
from upscale.errors import ConfigError
from upscale.merging.merging import METHODS
from upscale.merging.ties import elect, thresholds
from upscale.runtime.modeling_upscaled import UpscaledModel
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


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_twice(groups, tmp_path, method):
    for out in ("one", "two"):
        merge(groups(TABLE[1], 3), tmp_path / out, method)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# ----------------------------------------------------------------------------------------------------------------- TIES
def test_ties_by_hand():
    """Two tensors of two experts, of which half is kept: 4, -3, 2 and 5, 3, -3 (3 as large as -3, so both stay)."""
    deltas = {
        "a": [torch.tensor([[4.0, -3.0], [1.0, 0.5]]), torch.tensor([[-1.0, 5.0], [0.0, 3.0]])],
        "b": [torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.0])],
    }
    assert thresholds(deltas.__getitem__, ["a", "b"], 0.5) == [2.0, 3.0]
    assert elect(deltas["a"], [2.0, 3.0]).tolist() == [[4.0, 5.0], [0.0, 3.0]]
    assert elect(deltas["b"], [2.0, 3.0]).tolist() == [-3.0, 0.0]
    three = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([-2.0, 0.0])]
    assert elect(three, [1.0, 1.0, 1.0]).tolist() == [2.0, 0.0]  # the mean of 1 and 3; 2 - 2 elects no sign


magnitudes = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2**-149]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(magnitudes, min_size=1, max_size=40), st.data())
def test_the_threshold_is_the_magnitude_of_that_rank(values, data):
    """Ties, zeros and denormal numbers among them; however the values are dealt to tensors."""
    keep = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    parts = {"a": [torch.tensor(values[:cut])], "b": [torch.tensor(values[cut:])]}
    (found,) = thresholds(parts.__getitem__, ["a", "b"], keep / len(values))
    assert found == sorted(map(abs, values), reverse=True)[keep - 1]


@pytest.mark.parametrize(("density", "scaling"), [(0.2, None), (0.05, 0.5), (1.0, 1.0)])
def test_ties_is_the_papers_algorithm(groups, tmp_path, density, scaling):
    group = groups(TABLE[1], 3)
    base, experts = paths(group)
    merge(group, tmp_path / "out", "ties", density=density, scaling=scaling)
    was, got = tensors(base), tensors(tmp_path / "out")
    names = sorted(was)
    deltas = [torch.cat([(tensors(path)[n] - was[n]).flatten() for n in names]).tolist() for path in experts.values()]
    want = torch.tensor(reference.merged(deltas, round(density * len(deltas[0]))))
    assert (want == 0).any() == (density < 1) and (want != 0).float().mean() > 2 * density / 3
    added = torch.cat([(got[n] - was[n]).flatten() for n in names])
    torch.testing.assert_close(added, want * (1.0 if scaling is None else scaling), atol=1e-6, rtol=0)


def test_what_a_user_can_get_wrong(groups, tmp_path):
    group = groups(TABLE[0], 2)
    with pytest.raises(ConfigError, match="'median' is unknown; there are average, task-arithmetic, ties"):
        merge(group, tmp_path / "out", "median")
    with pytest.raises(ConfigError, match=r"density must be above 0 and at most 1, not 1\.5"):
        merge(group, tmp_path / "out", "ties", density=1.5)
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

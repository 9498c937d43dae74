"""A build's account of itself, recomputed from the files: norms, energy, sizes, the plan's bounds, progress."""

import json

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tests.reference.models import paths, tensors
from upscale.building.build import build, hashing
from upscale.building.methods import smile as method
from upscale.building.plan import make_plan
from upscale.config import SmileConfig
from zoo import check

FULL = 1000  # clamped: full rank


@pytest.mark.parametrize("rest", ["experts", "base"])
def test_report_is_what_the_files_say(architecture, groups, builds, rest):
    out, report = builds(architecture, 3, rank=8, rest=rest)
    base, experts = paths(groups(architecture, 3))
    was, built = tensors(base), tensors(out)
    tunes = {name: tensors(path) for name, path in experts.items()}
    layout = json.loads((out / "config.json").read_text())["upscale"]
    exact = {n for n, m in layout["modules"].items() if m.get("kind") == "norm"}
    shared = {n for n, m in layout["modules"].items() if "tied" in m}
    assert layout["modules"].keys() - exact - shared == {m.name for m in report.modules}
    assert bool(exact) == (rest == "experts")
    conv = {n for n, m in architecture.model(0).named_modules() if isinstance(m, Conv1D)}
    inside, total = dict.fromkeys(experts, 0.0), dict.fromkeys(experts, 0.0)
    for module in report.modules:
        ranks = layout["modules"][module.name]["ranks"]
        downs = built[f"{module.name}.experts.down"].double().split(ranks)
        ups = built[f"{module.name}.experts.up"].double().split(ranks, dim=1)
        for n, name in enumerate(experts):
            delta = tunes[name][f"{module.name}.weight"].double() - was[f"{module.name}.weight"].double()
            delta = delta.T if module.name in conv else delta
            norm, left = float(delta.norm()), float((delta - ups[n] @ downs[n]).norm())
            assert module.norms[name] == pytest.approx(norm, rel=1e-5)
            assert module.left[name] == pytest.approx(left, abs=1e-5 * norm)
            assert module.energy[name] == pytest.approx(1 - (left / norm) ** 2, abs=1e-4)
            inside[name], total[name] = inside[name] + left**2, total[name] + norm**2
    upscaled = {f"{m.name}.{part}" for m in report.modules for part in ("weight", "bias")}
    assert {r.name for r in report.rest} == was.keys() - upscaled
    if rest == "experts":
        assert {r.name.rpartition(".")[0] for r in report.rest} == exact
    for name in experts:
        changed = {n: float((tunes[name][n].double() - was[n].double()).norm()) for n in was.keys() - upscaled}
        lost = changed if rest == "base" else dict.fromkeys(changed, 0.0)  # norms are kept exactly
        for r in report.rest:
            assert r.norms[name] == pytest.approx(changed[r.name], rel=1e-5)
            assert r.left[name] == pytest.approx(lost[r.name], rel=1e-5)
        outside = sum(value**2 for value in lost.values()) ** 0.5
        assert report.left_behind(name) == pytest.approx((inside[name] ** 0.5, outside), rel=1e-4)
        assert report.energy[name] == pytest.approx(1 - inside[name] / total[name], abs=1e-4)
    assert report.base_bytes == sum(t.nbytes for t in was.values())
    assert report.group_bytes == 4 * report.base_bytes
    assert report.result_bytes == sum(t.nbytes for t in built.values())
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))


def test_averaged_rest_is_the_mean_and_its_report_what_is_missed(architecture, groups, builds):
    out, report = builds(architecture, 2, rank=FULL, lm_head=True, rest="average")
    base, experts = paths(groups(architecture, 2))
    was, built, tunes = tensors(base), tensors(out), {name: tensors(p) for name, p in experts.items()}
    assert report.rest
    missed = dict.fromkeys(tunes, 0.0)
    for rest in report.rest:
        mean = torch.stack([t[rest.name].double() for t in tunes.values()]).mean(dim=0)
        torch.testing.assert_close(built[rest.name].double(), mean, atol=1e-6, rtol=1e-6)
        for name, tune in tunes.items():
            assert rest.norms[name] == pytest.approx(float((tune[rest.name] - was[rest.name]).norm()), rel=1e-5)
            assert rest.left[name] == pytest.approx(float((tune[rest.name].double() - mean).norm()), rel=1e-4)
            missed[name] += rest.left[name] ** 2
    for name, square in missed.items():
        assert report.left_behind(name)[1] == pytest.approx(square**0.5)


@pytest.mark.parametrize(
    "options",
    [{}, {"rest": "base", "lm_head": True}, {"rest": "average", "dtype": "float16"}, {"exact": True}],
    ids=str,
)
def test_the_plan_bounds_what_is_written_and_progress_ends_at_its_total(architecture, groups, tmp_path, options):
    group, config = groups(architecture, 2), SmileConfig(rank=8, **options)
    verdict = check(group)
    plan = make_plan(verdict, method, config)
    seen = []
    with hashing(group, verdict) as hashes:
        report = build(plan, group, tmp_path / "out", hashes, progress=lambda *step: seen.append(step))
    for name, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == plan.declared[name].dtype
        assert tensor.nbytes <= plan.declared[name].nbytes
    assert report.result_bytes <= plan.result_bytes
    assert report.base_bytes == plan.base_bytes
    assert report.group_bytes == plan.group_bytes
    done, totals, names = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert {n.name for n in (*plan.linears, *plan.norms)} | set(plan.rest) == set(names)

"""Spectra and overlaps against plain SVDs, their cache, and what `upscale spectra` shows of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, inline, upscale
from tests.reference.models import paths, tensors
from upscale import smile
from upscale.building import spectra_plots as plots
from upscale.building.methods import smile as method
from upscale.building.plan import make_plan
from upscale.building.ranks import heads
from upscale.building.skeleton import Linear
from upscale.building.spectra import block, overlap, spectra, squared_singular_values
from upscale.building.spectra_cache import cache_file
from upscale.config import SmileConfig
from upscale.errors import ConfigError, NonFiniteError
from zoo import Checkpoint, Group, check

LLAMA = TABLE[0]
GPT2 = next(architecture for architecture in TABLE if architecture.name == "gpt2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "upscale-zoo"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the tensors that are read from here on."""
    names, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: names.append(name) or read(self, name))
    return names


@pytest.fixture
def copied(groups, tmp_path) -> Group:
    """A group of its own, to be changed."""
    base, experts = paths(groups(LLAMA, 2))
    for directory in (base, *experts.values()):
        shutil.copytree(directory, tmp_path / directory.name)
    return Group.of(tmp_path / base.name, {name: tmp_path / path.name for name, path in experts.items()})


def modules(verdict):
    return make_plan(verdict, method, SmileConfig(rest="experts")).linears


def edit(group, expert, change) -> None:
    file = group.experts[expert].resolve() / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------ the figures
def test_spectra_are_those_of_plain_svds(architecture, groups):
    group = groups(architecture, 3)
    base, experts = paths(group)
    verdict = check(group)
    wanted = modules(verdict)
    found = spectra(verdict, wanted)
    assert list(found.values) == list(found.overlaps) == [m.name for m in wanted]
    was, tunes = tensors(base), {name: tensors(path) for name, path in experts.items()}
    for module in wanted:
        for name, tune in tunes.items():
            delta = tune[module.weight] - was[module.weight]
            delta = (delta.T if module.transposed else delta).double()
            assert delta.shape == (module.out_features, module.in_features)
            values = found.values[module.name][name]
            assert values.dtype == torch.float64
            torch.testing.assert_close(values.sqrt(), torch.linalg.svdvals(delta), atol=1e-6, rtol=1e-9)
            assert found.norms[module.name][name] == pytest.approx(float(delta.norm()))


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda architecture: architecture.name)
def test_overlaps_are_those_of_the_input_directions(architecture, groups, tmp_path):
    base, _ = paths(groups(architecture, 2))
    generator, was = torch.Generator().manual_seed(3), tensors(base)
    wanted = modules(check(groups(architecture, 2)))
    tunes = {"left": dict(was), "right": dict(was)}
    for module in wanted:
        inputs = torch.linalg.qr(torch.randn(module.in_features, 24, generator=generator)).Q.T
        for tune, rows in zip(tunes.values(), (inputs[:16], inputs[8:]), strict=True):  # they share 8 of 16
            outputs = torch.linalg.qr(torch.randn(module.out_features, 16, generator=generator)).Q
            delta = outputs * torch.arange(16, 0, -1) @ rows
            tune[module.weight] = was[module.weight] + (delta.T if module.transposed else delta)
    for name, tune in tunes.items():
        shutil.copytree(base, tmp_path / name)
        content = {key: tensor.contiguous() for key, tensor in tune.items()}
        save_file(content, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    found = spectra(check(Group.of(base, {name: tmp_path / name for name in tunes})), wanted)
    for matrix in found.overlaps.values():
        torch.testing.assert_close(matrix, torch.tensor([[1, 0.5], [0.5, 1]]).double(), atol=1e-4, rtol=0)
    assert found.chance == {m.name: 16 / m.in_features for m in wanted}


def test_random_deltas_overlap_by_chance(tmp_path):
    """In a large flat spectrum any directions lead: the sketch of one expert must not lean towards another's."""
    generator = torch.Generator().manual_seed(4)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        weight = torch.randn(4000, 512, generator=generator)
        save_file(
            {"x.weight": weight if name != "base" else torch.zeros(4000, 512)}, tmp_path / name / "model.safetensors"
        )
    verdict = check(Group.of(tmp_path / "base", {name: tmp_path / name for name in "ab"}))
    found = spectra(verdict, [Linear("x", "x.weight", None, 512, 4000, transposed=False, head=False)])
    assert found.chance["x"] == 16 / 512
    assert float(found.overlaps["x"][0, 1]) == pytest.approx(16 / 512, rel=0.2)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9000, 5), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_squared_singular_values(shape, dtype):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(squared_singular_values(delta), torch.linalg.svdvals(delta.double()) ** 2)


def test_beyond_the_rank_of_a_delta_singular_values_are_zero():
    generator = torch.Generator().manual_seed(2)
    delta = torch.randint(-3, 4, (60, 3), generator=generator).double() @ torch.ones(3, 50).double().tril()
    values = squared_singular_values(delta)
    assert (values > 0).sum() == 3 and not values[3:].any()
    assert not squared_singular_values(torch.zeros(4, 9)).any()


def test_overlap_of_known_subspaces():
    rows = torch.eye(6, dtype=torch.float64)
    turned = torch.stack([(rows[0] + rows[1]) / 2**0.5, (rows[0] - rows[1]) / 2**0.5])  # another basis of the same
    angle = torch.stack([rows[0], (rows[1] + 3**0.5 * rows[4]) / 2])  # one direction at 60 degrees
    got = overlap([rows[:2], turned, angle, rows[2:4], rows[:1], rows[:0]])
    nan = float("nan")
    want = [
        [1, 1, 0.625, 0, 1, nan],
        [1, 1, 0.625, 0, 1, nan],
        [0.625, 0.625, 1, 0, 1, nan],
        [0, 0, 0, 1, 0, nan],
        [1, 1, 1, 0, 1, nan],
        [nan] * 6,
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True)


def test_energies_and_means_are_those_of_the_values(groups):
    verdict = check(groups(LLAMA, 3))
    found = spectra(verdict, modules(verdict))
    for rank in (1, 8, 40, 64):
        parts = [sum(v["e2"].tolist()[:rank]) / sum(v["e2"].tolist()) for v in found.values.values()]
        assert float(found.energy_by_rank("e2")[rank - 1]) == pytest.approx(sum(parts) / len(parts))
        assert [by_expert["e2"] for by_expert in found.energy_at(rank).values()] == pytest.approx(parts)
    torch.testing.assert_close(found.overlap(), sum(found.overlaps.values()) / len(found.overlaps))
    blocks = found.overlap_by_block()
    assert list(blocks) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    own = [m for name, m in found.overlaps.items() if name.startswith("model.layers.1.")]
    torch.testing.assert_close(blocks["model.layers.1"], sum(own) / 7)
    assert block("transformer.h.11.attn.c_attn") == "transformer.h.11" and block("lm_head") == "lm_head"


def test_an_expert_that_changed_nothing_has_no_energy_and_no_overlap(copied):
    base = load_file(copied.base.resolve() / "model.safetensors")
    edit(copied, "e2", lambda tensors: tensors.update(base))
    verdict = check(copied)
    found = spectra(verdict, modules(verdict))
    assert not any(v["e2"].any() for v in found.values.values())
    whole = found.overlap()
    assert whole[0, 0] == pytest.approx(1) and whole[0, 1].isnan() and whole[1, 1].isnan()
    assert found.energy_by_rank("e2").tolist() == [1.0] * 64
    assert found.energy_at(1)["lm_head"]["e2"] == 1.0 > found.energy_at(1)["lm_head"]["e1"]


@pytest.mark.parametrize(("who", "value"), [("base", float("nan")), ("e2", float("inf"))])
def test_what_is_not_finite_is_named(copied, who, value):
    name = "model.layers.1.mlp.up_proj.weight"
    group = Group(copied.base, {**copied.experts})
    directory = group.base.resolve() if who == "base" else group.experts[who].resolve()
    content = load_file(directory / "model.safetensors")
    content[name][3, 4] = value
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    verdict = check(group)
    culprit = "base" if who == "base" else f"expert {who}"
    with pytest.raises(NonFiniteError, match=f"{culprit}: tensor {name} has NaN or infinite"):
        spectra(verdict, modules(verdict))


def test_a_device_that_is_not_there_is_named(groups):
    verdict = check(groups(LLAMA, 2))
    with pytest.raises(ConfigError, match="--device cuda:99"):
        spectra(verdict, modules(verdict), device="cuda:99")


def test_output_heads_are_found_tied_or_not(architecture, groups):
    verdict = check(groups(architecture, 2))
    wanted = modules(verdict)
    [name] = heads(verdict.base, wanted)  # the one that gives logits
    module = next(m for m in wanted if m.name == name)
    vocabulary = verdict.base.config["vocab_size"]
    assert module.head or (vocabulary == module.out_features and not any(m.head for m in wanted))
    assert not heads(verdict.base, [m for m in wanted if m.name != name])


# --------------------------------------------------------------------------------------------------------- the cache
def assert_same(found, again):
    assert found.experts == again.experts and list(found.values) == list(again.values)
    for name, values in found.values.items():
        assert values.keys() == again.values[name].keys()
        assert all(torch.equal(v, again.values[name][e]) for e, v in values.items())
        assert torch.equal(found.overlaps[name], again.overlaps[name])


def test_known_spectra_are_not_computed_again(groups, reads, cache):
    verdict = check(groups(LLAMA, 2))
    wanted, steps = modules(verdict), []
    some = wanted[3:7]
    first = spectra(verdict, some, progress=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(n, 8) for n in range(1, 9)]
    assert {step[2] for step in steps} == {m.name for m in some}
    assert len(reads) == 3 * 4
    reads.clear()
    assert_same(first, spectra(verdict, some))
    assert reads == []
    every = spectra(verdict, wanted)  # what is missing joins what is there
    assert set(reads) == {m.weight for m in wanted} - {m.weight for m in some}
    reads.clear()
    assert_same(every, spectra(verdict, wanted))
    assert_same(first, spectra(verdict, some))
    assert reads == [] and [file.name for file in cache.iterdir()] == [cache_file(verdict).name]


@pytest.mark.parametrize("who", ["base", "e1", "e2"])
def test_a_changed_source_is_computed_again(copied, who):
    before = spectra(check(copied), modules(check(copied)))
    directory = copied.base.resolve() if who == "base" else copied.experts[who].resolve()
    file = directory / "model.safetensors"
    content, was = load_file(file), file.stat()
    content["lm_head.weight"] *= 1.5
    save_file(content, file, metadata={"format": "pt"})
    assert file.stat().st_size == was.st_size
    after = spectra(check(copied), modules(check(copied)))
    for expert in ("e1", "e2"):
        same = torch.equal(before.values["lm_head"][expert], after.values["lm_head"][expert])
        assert same == (who not in ("base", expert))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))  # as if it were the file of before
    assert_same(before, spectra(check(copied), modules(check(copied))))


def test_names_and_order_of_experts_count(copied):
    e1, e2 = copied.experts.values()
    keys = {
        cache_file(check(Group(copied.base, experts)))
        for experts in ({"a": e1, "b": e2}, {"b": e2, "a": e1}, {"a": e2, "b": e1}, {"a": e1}, {"a": e1, "c": e2})
    }
    assert len(keys) == 5


def test_a_hub_snapshot_counts_by_its_commit(copied, tmp_path):
    def moved(root: str, commit: str) -> Path:
        snapshot = tmp_path / root / "models--org--name" / "snapshots" / commit
        shutil.copytree(copied.base.resolve(), snapshot, copy_function=shutil.copy)  # with times of its own
        return cache_file(check(Group.of(snapshot, {"e": str(copied.experts["e1"])})))

    assert moved("here", "c1") == moved("there", "c1") != moved("here", "c2")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", None], ids=["empty", "garbage", "cut"])
def test_a_broken_cache_is_computed_again(groups, reads, cache, content):
    verdict = check(groups(LLAMA, 2))
    wanted = modules(verdict)[-2:]
    first = spectra(verdict, wanted)
    file = cache_file(verdict)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    reads.clear()
    assert_same(first, spectra(verdict, wanted))
    assert reads
    reads.clear()
    assert_same(first, spectra(verdict, wanted))
    assert not reads


def test_what_was_computed_survives_an_interruption(groups, reads):
    verdict = check(groups(LLAMA, 2))
    wanted = modules(verdict)[:3]

    def stop(done, total, name):
        if done == 5:  # in the third module
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spectra(verdict, wanted, progress=stop)
    reads.clear()
    spectra(verdict, wanted)
    assert set(reads) == {wanted[2].weight}


def test_a_cache_that_cannot_be_written_is_no_error(groups, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    verdict = check(groups(LLAMA, 2))
    assert spectra(verdict, modules(verdict)[:1]).values


# ------------------------------------------------------------------------------------------------------- the command
def test_the_command_prints_and_writes_what_was_found(groups, tmp_path):
    group = groups(LLAMA, 3)
    result = upscale("spectra", *inline(group), "--rank", "24", "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "s.json").read_text())
    verdict = check(group)
    found = spectra(verdict, modules(verdict))
    shares = [v["e3"].tolist() for v in found.values.values()]
    kept = sum(sum(share[:24]) / sum(share) for share in shares) / len(shares)
    assert written["energy"]["e3"]["24"] == pytest.approx(kept)
    assert f"{kept:.1%}" in result.output
    assert written["energy"]["e3"]["128"] == pytest.approx(1)
    assert written["overlap"][0][2] == pytest.approx(float(found.overlap()[0, 2]))
    assert f"{float(found.overlap()[0, 2]):.2f}" in result.output
    assert written["modules"].keys() == found.values.keys()
    down = written["modules"]["model.layers.1.mlp.down_proj"]
    values = found.values["model.layers.1.mlp.down_proj"]["e2"].tolist()
    assert down["energy"]["e2"]["16"] == pytest.approx(sum(values[:16]) / sum(values))
    assert down["rank_for"]["0.95"]["e2"] == next(n for n in range(64) if sum(values[:n]) >= 0.95 * sum(values))
    values = found.values["lm_head"]["e2"].tolist()
    rank = next(n for n in range(65) if sum(values[n:]) <= 0.025 * sum(values[1:]))
    assert written["modules"]["lm_head"]["rank_for"]["0.95"]["e2"] == rank
    assert down["norms"]["e2"] == pytest.approx(found.norms["model.layers.1.mlp.down_proj"]["e2"])
    for energy, nbytes in written["result_bytes"]["experts"].items():
        assert f"{nbytes / written['base_bytes']:.2f}x" in result.output
        # A build for this energy has this size, and this energy in every module and expert.
        report = smile(group, tmp_path / energy, energy=float(energy), exact=True)
        assert report.result_bytes == nbytes
        assert all(float(energy) - 1e-6 <= part for module in report.modules for part in module.energy.values())


def test_one_expert_and_one_that_changed_nothing_are_shown(groups, copied, tmp_path):
    one = Group(copied.base, {"e1": copied.experts["e1"]})
    result = upscale("spectra", *inline(one), "--plot", tmp_path / "one.png")
    assert result.exit_code == 0 and "Overlap" not in result.output, result.output
    base = load_file(copied.base.resolve() / "model.safetensors")
    edit(copied, "e2", lambda tensors: tensors.update(base))
    result = upscale("spectra", *inline(copied), "--plot", tmp_path / "idle.png", "--json", tmp_path / "idle.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "idle.json").read_text())["overlap"][0][1] is None


def test_a_picture_shows_something_and_is_the_same_each_time(groups, tmp_path):
    from matplotlib.image import imread

    verdict = check(groups(LLAMA, 3))
    found = spectra(verdict, modules(verdict)[1:3])
    for name in ("a.png", "a.svg", "b.svg"):
        plots.draw(found, tmp_path / name, rank=8)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    pixels = imread(tmp_path / "a.png")[..., :3]
    height, width, _ = pixels.shape
    assert width == 1540 and height > 900
    for part in pixels[: height - height % 6].reshape(6, -1):  # from top to bottom
        assert part.std() > 0.05
    plots.draw(found, tmp_path / "c.svg", rank=2)
    assert (tmp_path / "c.svg").read_bytes() != (tmp_path / "a.svg").read_bytes()


def test_bad_options_are_one_line_before_any_work(groups, tmp_path, monkeypatch, reads):
    group = inline(groups(LLAMA, 2))

    def refused(message, *args):
        result = upscale("spectra", *group, *args)
        assert result.exit_code != 0
        assert_one_message(result.output, message)
        assert reads == []

    refused("ends in .png or .svg", "--plot", tmp_path / "x.pdf")
    refused("no file can be written there", "--plot", tmp_path / "none" / "x.png")
    refused("no file can be written there", "--json", tmp_path)
    refused("--rank", "--rank", "0")
    refused("--device warp", "--device", "warp")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    refused("pip install 'upscale-zoo[plot]'", "--plot", tmp_path / "x.png")


def test_a_group_that_does_not_fit_is_refused(groups, tmp_path):
    base, experts = paths(groups(LLAMA, 2))
    other, _ = paths(groups(TABLE[1], 2))
    result = upscale("spectra", *inline(Group.of(base, {"e1": experts["e1"], "other": other})))
    assert result.exit_code == 1
    assert_one_message(result.output, "expert other: architecture")

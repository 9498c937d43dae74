"""Sparse task vectors: what is kept, how it is packed, and the bytes that it takes on disk."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.architectures import TABLE
from tests.reference import wemoe as reference
from tests.reference.models import IDS, close, logits, tensors
from tests.routers import copied
from tests.test_upscale_wemoe import randomise
from upscale import load
from upscale.runtime.dense_upscaled import longest, pack, unpack

LLAMA, GPT2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "gpt2"))
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0, 0.5, -0.5, 2.0, -3.0, 1e-30, -1e30])  # many are equal


@st.composite
def deltas(draw):
    """A delta of random numbers, or of a few equal ones and zeros, or nearly all zeros: wide steps."""
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    size = shape[0] * shape[1]
    kind = draw(st.sampled_from(["random", "equal", "empty"]))
    if kind == "equal":
        return torch.tensor(draw(st.lists(NUMBERS, min_size=size, max_size=size))).view(shape)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    if kind == "empty":
        delta = torch.zeros_like(delta)
        for place in draw(st.sets(st.integers(0, size - 1), max_size=5)):
            delta.view(-1)[place] = place + 1.0
    return delta


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_exactly_the_largest_entries_come_back(data):
    delta = data.draw(deltas())
    kept = data.draw(st.integers(1, delta.numel()))
    values, gaps = pack(delta, kept)
    assert values.shape == (kept,) and values.dtype == delta.dtype
    assert gaps.dtype == torch.uint8 and len(gaps) <= longest(delta.numel(), kept)
    back = unpack(values[None], gaps[None], tuple(delta.shape))
    assert back.shape == (1, *delta.shape)
    assert torch.equal(back[0], reference.pruned(delta, kept / delta.numel()))
    # Any entry left out is no larger than any that is kept, whatever the reference says.
    magnitude = delta.abs().flatten().sort(descending=True).values
    assert torch.equal(values.abs().sort(descending=True).values, magnitude[:kept])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_steps_that_keep_nothing_may_follow(data):
    """Experts whose positions take fewer bytes than another's are filled up."""
    delta = data.draw(deltas())
    values, gaps = pack(delta, data.draw(st.integers(1, delta.numel())))
    filled = torch.cat([gaps, gaps.new_full((data.draw(st.integers(1, 40)),), 255)])
    one, other = (unpack(values[None], g[None], tuple(delta.shape)) for g in (gaps, filled))
    assert torch.equal(one, other)


def test_positions_are_as_documented():
    """The first, the sixteenth (15 on) and the last of 40 (24 on: one step of 15 at which nothing is kept, then 9)."""
    delta = torch.zeros(4, 10)
    delta.view(-1)[[0, 15, 39]] = torch.tensor([5.0, -7.0, 6.0])
    values, gaps = pack(delta, 3)
    assert values.tolist() == [5.0, -7.0, 6.0]
    assert gaps.tolist() == [0 * 16 + 14, 15 * 16 + 8]
    assert pack(delta, 2)[0].tolist() == [-7.0, 6.0]
    assert pack(delta, 2)[1].tolist() == [15 * 16 + 0, 15 * 16 + 8]


def test_several_experts_do_not_mix():
    given = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))
    packed = [pack(delta, 9) for delta in given]
    size = max(len(gaps) for _, gaps in packed)
    rows = torch.stack([torch.cat([gaps, gaps.new_full((size - len(gaps),), 255)]) for _, gaps in packed])
    back = unpack(torch.stack([values for values, _ in packed]), rows, (6, 7))
    for got, delta in zip(back, given, strict=True):
        assert torch.equal(got, reference.pruned(delta, 9 / 42))


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)
@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 1.0])
def test_a_checkpoint_holds_the_pruned_deltas(architecture, density, wemoes):
    sparse, dense = wemoes(architecture, vectors="sparse", density=density), wemoes(architecture, vectors="dense")
    stored, whole = tensors(sparse), tensors(dense)
    modules = json.loads((sparse / "config.json").read_text())["upscale"]["modules"]
    assert len(modules) == 2 * (3 if architecture is LLAMA else 2)
    for name in modules:
        deltas = whole[f"{name}.experts.delta"]
        back = unpack(stored[f"{name}.experts.values"], stored[f"{name}.experts.gaps"], tuple(deltas.shape[1:]))
        for got, delta in zip(back, deltas, strict=True):
            assert torch.equal(got, reference.pruned(delta, density)), name
    others = {n: t for n, t in whole.items() if not n.endswith("experts.delta")}
    assert all(torch.equal(stored[n], t) for n, t in others.items())
    model = load(sparse)
    for expert in ("e2", "base") if density == 1.0 else ():
        with model.force(expert), (twin := load(dense)).force(expert):
            assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)
def test_sparse_vectors_are_pruned_by_magnitude(architecture, groups, wemoes, tmp_path):
    """The weights' are; a bias is stored whole, as it takes next to nothing."""
    out = copied(wemoes(architecture, vectors="sparse", density=0.1), tmp_path / "out")
    values = randomise(out)

    def thin(tau):
        if tau.ndim == 1:
            return tau
        return reference.pruned(tau.T, 0.1).T if architecture is GPT2 else reference.pruned(tau, 0.1)

    close(logits(load(out)), logits(reference.of_group(groups(architecture, 3), values, 2, thin=thin)))


def nbytes(directory, *names):
    """Bytes of all experts' tensors of these names, as the files have them."""
    sizes = []
    for file in directory.glob("model*.safetensors"):
        with file.open("rb") as raw:
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        for name, entry in header.items():
            if name.rpartition(".experts.")[2] in names:
                start, end = entry["data_offsets"]
                sizes.append(end - start)
    return sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)
def test_a_tenth_of_the_entries_takes_little_more_than_a_tenth_of_the_bytes(architecture, dtype, wemoes):
    sparse = wemoes(architecture, vectors="sparse", density=0.1, dtype=dtype)
    dense = wemoes(architecture, vectors="dense", dtype=dtype)
    values, gaps, deltas = nbytes(sparse, "values"), nbytes(sparse, "gaps"), nbytes(dense, "delta")
    count = 2 * (3 if architecture is LLAMA else 2)
    assert len(values) == len(gaps) == len(deltas) == count
    assert sum(deltas) == sum(t.nbytes for n, t in tensors(dense).items() if n.endswith(".delta"))
    assert 0 < sum(values) + sum(gaps) <= 0.15 * sum(deltas)
    assert not nbytes(sparse, "delta", "down", "up") and not nbytes(dense, "values", "gaps")
    kinds = {n.rpartition(".")[2]: t.dtype for n, t in tensors(sparse).items()}
    assert kinds["gaps"] == torch.uint8 and kinds["values"] == getattr(torch, dtype)


def test_a_saved_model_stays_small(wemoes, tmp_path):
    """Unpacked to run, once, and saved as it was."""
    out = wemoes(LLAMA, vectors="sparse", density=0.1)
    model = load(out)
    want = logits(model)
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "saved")
    one, two = tensors(out), tensors(tmp_path / "saved")
    assert {n for n in one if ".experts." in n} == {n for n in two if ".experts." in n}
    assert all(torch.equal(t, two[n]) for n, t in one.items() if ".experts." in n)
    assert torch.equal(logits(load(tmp_path / "saved")), want)


@pytest.mark.parametrize("first", [torch.enable_grad, torch.inference_mode, torch.no_grad], ids=lambda f: f.__name__)
def test_routers_train_whatever_the_first_pass_was(first, wemoes):
    """Which is the one that unpacks."""
    model = load(wemoes(LLAMA, vectors="sparse", density=0.1))
    with first():
        model(input_ids=IDS)
    for _ in range(2):
        model(input_ids=IDS).logits.square().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0

"""Ranks under a budget or for an energy, against plain greedy loops and brute force."""

import re
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upscale.budget import (
    allocate,
    for_energy,
    nbytes,
    parse_budget,
    sizes_for,
    smallest_bytes,
    within_budget,
)
from upscale.errors import ConfigError

# Whole numbers: their sums are exact in any order, so that plain code finds the very same ties.
_values = st.lists(st.integers(0, 20), max_size=4).map(lambda v: torch.tensor(sorted(v)[::-1], dtype=torch.float64))


@st.composite
def problems(draw, equal_costs=False):
    """Spectra of a few modules and experts, and costs."""
    modules, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    spectra = {f"m{m}": {f"e{e}": draw(_values) for e in range(experts)} for m in range(modules)}
    price = draw(st.integers(1, 30))
    return spectra, {name: price if equal_costs else draw(st.integers(1, 30)) for name in spectra}


def share(spectra, ranks, expert):
    """Part of an expert's energy that ranks keep, added up one by one."""
    total = sum(sum(experts[expert].tolist()) for experts in spectra.values())
    kept = sum(sum(spectra[m][expert].tolist()[: ranks[m][expert]]) for m in spectra)
    return kept / total if total else 1.0


def directions(spectra, cost):
    """(density, module number, expert number, index, cost) of each direction with energy, best first."""
    names = list(next(iter(spectra.values())))
    totals = {e: sum(sum(experts[e].tolist()) for experts in spectra.values()) for e in names}
    found = [
        (-(value / totals[e] / cost[m]), number, names.index(e), index, cost[m], m, e)
        for number, m in enumerate(spectra)
        for e in names
        for index, value in enumerate(spectra[m][e].tolist())
        if value
    ]
    return sorted(found)


@given(problems(), st.integers(-10, 400))
def test_directions_are_taken_by_energy_per_byte_until_the_next_does_not_fit(problem, available):
    spectra, cost = problem
    taken, left = {m: {e: [] for e in experts} for m, experts in spectra.items()}, available
    for *_, index, price, module, expert in directions(spectra, cost):
        if price > left:
            break
        left -= price
        taken[module][expert].append(index)
    ranks = allocate(spectra, cost, available_bytes=available)
    for module, experts in taken.items():
        for expert, indices in experts.items():
            assert indices == list(range(len(indices)))  # the leading ones, in order
            assert ranks[module][expert] == len(indices)
    assert nbytes(ranks, cost) == available - left


@given(problems(), st.integers(0, 400), st.integers(0, 50))
def test_more_bytes_never_lower_a_rank(problem, available, more):
    spectra, cost = problem
    fewer = allocate(spectra, cost, available_bytes=available)
    ranks = allocate(spectra, cost, available_bytes=available + more)
    assert all(fewer[m][e] <= ranks[m][e] for m in spectra for e in spectra[m])


def every_ranks(spectra):
    slots = [(m, e) for m in spectra for e in spectra[m]]
    for combination in product(*(range(int((spectra[m][e] > 0).sum()) + 1) for m, e in slots)):
        ranks = {m: {} for m in spectra}
        for (m, e), rank in zip(slots, combination, strict=True):
            ranks[m][e] = rank
        yield ranks


@st.composite
def small_problems(draw):
    spectra, cost = draw(problems(equal_costs=True))
    return {m: {e: v[:2] for e, v in list(x.items())[:2]} for m, x in spectra.items()}, cost


@given(small_problems(), st.integers(0, 200))
def test_with_equal_costs_no_ranks_of_the_same_size_keep_more(problem, available):
    spectra, cost = problem
    experts = list(spectra["m0"])
    ranks = allocate(spectra, cost, available_bytes=available)
    best = max(sum(share(spectra, r, e) for e in experts) for r in every_ranks(spectra) if nbytes(r, cost) <= available)
    assert sum(share(spectra, ranks, e) for e in experts) == pytest.approx(best)


@given(small_problems(), st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]))
def test_with_equal_costs_no_smaller_ranks_keep_the_energy(problem, energy):
    spectra, cost = problem
    experts = list(spectra["m0"])

    def enough(ranks):
        return all(share(spectra, ranks, e) >= energy - 1e-12 for e in experts)

    ranks = for_energy(spectra, cost, energy=energy)
    assert enough(ranks)
    assert nbytes(ranks, cost) == min(nbytes(r, cost) for r in every_ranks(spectra) if enough(r))


@given(problems(), st.floats(0.01, 1))
def test_every_expert_keeps_the_energy_and_would_not_without_its_last_direction(problem, energy):
    spectra, cost = problem
    ranks = for_energy(spectra, cost, energy=energy)
    order = directions(spectra, cost)
    for number, expert in enumerate(spectra["m0"]):
        assert share(spectra, ranks, expert) >= energy - 1e-12
        mine = [(m, index) for _, _, e, index, _, m, _ in order if e == number]
        count = sum(ranks[m][expert] for m in spectra)
        assert {(m, i) for m in spectra for i in range(ranks[m][expert])} == set(mine[:count])
        if count:
            module = mine[count - 1][0]
            fewer = {m: {expert: ranks[m][expert] - (m == module)} for m in spectra}
            assert share(spectra, fewer, expert) < energy + 1e-12


@given(problems())
def test_the_smallest_size_gives_every_changed_expert_a_direction(problem):
    spectra, cost = problem
    changed = [e for e in spectra["m0"] if any(experts[e].any() for experts in spectra.values())]

    def served(available):
        ranks = allocate(spectra, cost, available_bytes=available)
        return all(any(ranks[m][e] for m in spectra) for e in changed)

    smallest = smallest_bytes(spectra, cost)
    assert served(smallest)
    assert not changed or not served(smallest - 1)


def test_an_experts_scale_does_not_matter():
    torch.manual_seed(0)
    spectra = {m: {e: torch.rand(9).double().sort(descending=True).values for e in "ab"} for m in "xyz"}
    cost = {"x": 8, "y": 12, "z": 40}
    scaled = {m: {"a": v["a"], "b": v["b"] * 2.0**-40} for m, v in spectra.items()}
    assert allocate(scaled, cost, available_bytes=500) == allocate(spectra, cost, available_bytes=500)


SPECTRA = {
    "small": {"a": torch.tensor([6.0, 2.0]).double(), "b": torch.tensor([0.0, 0.0]).double()},
    "large": {"a": torch.tensor([8.0]).double(), "b": torch.tensor([0.0]).double()},
}
COST = {"small": 10, "large": 30}


def test_by_hand():
    # Energy per byte: small 6/10, 2/10; large 8/30.
    assert allocate(SPECTRA, COST, available_bytes=10) == {"small": {"a": 1, "b": 0}, "large": {"a": 0, "b": 0}}
    assert allocate(SPECTRA, COST, available_bytes=40) == {"small": {"a": 1, "b": 0}, "large": {"a": 1, "b": 0}}
    assert allocate(SPECTRA, COST, available_bytes=999) == {"small": {"a": 2, "b": 0}, "large": {"a": 1, "b": 0}}
    assert for_energy(SPECTRA, COST, energy=0.375) == {"small": {"a": 1, "b": 0}, "large": {"a": 0, "b": 0}}
    assert sizes_for(SPECTRA, COST, (0.3, 0.8, 0.9)) == {0.3: 10, 0.8: 40, 0.9: 50}
    assert smallest_bytes(SPECTRA, COST) == 10


def test_no_spectra_need_nothing():
    assert allocate({}, {}, available_bytes=5) == {}
    assert for_energy({}, {}, energy=0.5) == {}
    assert smallest_bytes({}, {}) == 0


def test_a_budget_is_a_multiple_of_the_base_and_the_smallest_is_named():
    ranks = within_budget(SPECTRA, COST, budget=1.05, base_bytes=1000, fixed_bytes=1010)
    assert nbytes(ranks, COST) == 40  # 1050 in all, 1010 of them fixed
    for budget in (1.019, 1.0, 0.5):
        with pytest.raises(ConfigError, match=rf"--budget {budget:g}x cannot be met: the smallest is 1\.020x"):
            within_budget(SPECTRA, COST, budget=budget, base_bytes=1000, fixed_bytes=1010)
    assert nbytes(within_budget(SPECTRA, COST, budget=1.02, base_bytes=1000, fixed_bytes=1010), COST) == 10


@given(st.integers(1, 10**12), st.integers(0, 10**12))
def test_the_smallest_that_an_error_names_can_be_met(base_bytes, fixed_bytes):
    with pytest.raises(ConfigError) as caught:
        within_budget(SPECTRA, COST, budget=1e-15, base_bytes=base_bytes, fixed_bytes=fixed_bytes)
    named = parse_budget(re.findall(r"smallest is (\S+),", str(caught.value))[0])
    within_budget(SPECTRA, COST, budget=named, base_bytes=base_bytes, fixed_bytes=fixed_bytes)


@pytest.mark.parametrize(("text", "value"), [("1.5x", 1.5), ("1.5", 1.5), (" 2X ", 2.0), (".5x", 0.5), ("3.", 3.0)])
def test_budgets_are_read(text, value):
    assert parse_budget(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "0", "0.0x", "-1x", "1.5GB", "150%", "1,5", "nan", "inf", "1e3x", "1_5", "\u0661x", "9" * 400]
)
def test_nonsense_budgets_are_refused_with_the_form(text):
    with pytest.raises(ConfigError, match=r"--budget .*e\.g\. 1\.5x"):
        parse_budget(text)


@pytest.mark.parametrize("energy", [0, -1, 1.01, float("nan"), float("inf")])
def test_nonsense_energies_are_refused(energy):
    with pytest.raises(ConfigError, match="--energy"):
        for_energy(SPECTRA, COST, energy=energy)

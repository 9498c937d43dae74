"""Ranks under a budget or for an energy, against plain greedy loops and brute force."""

import re
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upscale.building.budget import (
    HEAD,
    allocate,
    energies_of,
    for_energy,
    nbytes,
    parse_budget,
    smallest_bytes,
    within_budget,
)
from upscale.errors import ConfigError

# Whole numbers: their sums are exact in any order, so that plain code finds the very same ties.
_values = st.lists(st.integers(0, 20), max_size=4).map(lambda v: torch.tensor(sorted(v)[::-1], dtype=torch.float64))


@st.composite
def problems(draw, equal_costs=False):
    """Energies of a few modules and experts, and costs."""
    modules, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    energies = {f"m{m}": {f"e{e}": draw(_values) for e in range(experts)} for m in range(modules)}
    price = draw(st.integers(1, 30))
    return energies, {name: price if equal_costs else draw(st.integers(1, 30)) for name in energies}


def kept(energies, ranks, weights):
    """Energy that ranks keep of all deltas, times the modules' weights, added up one by one."""
    return sum(
        weights[m] * sum(v.tolist()[: ranks[m][e]]) for m, experts in energies.items() for e, v in experts.items()
    )


def directions(energies, cost):
    """(minus energy, module number, expert number, index, cost) of each direction with energy, best first."""
    names = list(next(iter(energies.values())))
    found = [
        (-value, number, names.index(e), index, cost[m], m, e)
        for number, m in enumerate(energies)
        for e in names
        for index, value in enumerate(energies[m][e].tolist())
        if value
    ]
    return sorted(found)


@given(problems(), st.integers(-10, 400))
def test_directions_are_taken_by_energy_until_the_next_does_not_fit(problem, available):
    energies, cost = problem
    taken, left = {m: {e: [] for e in experts} for m, experts in energies.items()}, available
    for *_, index, price, module, expert in directions(energies, cost):
        if price > left:
            break
        left -= price
        taken[module][expert].append(index)
    ranks = allocate(energies, cost, available_bytes=available)
    for module, experts in taken.items():
        for expert, indices in experts.items():
            assert indices == list(range(len(indices)))  # the leading ones, in order
            assert ranks[module][expert] == len(indices)
    assert nbytes(ranks, cost) == available - left


@given(problems(), st.integers(0, 400), st.integers(0, 50))
def test_more_bytes_never_lower_a_rank(problem, available, more):
    energies, cost = problem
    fewer = allocate(energies, cost, available_bytes=available)
    ranks = allocate(energies, cost, available_bytes=available + more)
    assert all(fewer[m][e] <= ranks[m][e] for m in energies for e in energies[m])


def every_ranks(energies):
    slots = [(m, e) for m in energies for e in energies[m]]
    for combination in product(*(range(int((energies[m][e] > 0).sum()) + 1) for m, e in slots)):
        ranks = {m: {} for m in energies}
        for (m, e), rank in zip(slots, combination, strict=True):
            ranks[m][e] = rank
        yield ranks


@st.composite
def small_problems(draw, equal_costs=False):
    energies, cost = draw(problems(equal_costs))
    return {m: {e: v[:2] for e, v in list(x.items())[:2]} for m, x in energies.items()}, cost


@given(small_problems(equal_costs=True), st.integers(0, 200))
def test_with_equal_costs_no_ranks_of_the_same_size_keep_more(problem, available):
    energies, cost = problem
    ranks = allocate(energies, cost, available_bytes=available)
    best = max(kept(energies, r, cost) for r in every_ranks(energies) if nbytes(r, cost) <= available)
    assert kept(energies, ranks, cost) == best


@given(small_problems(), st.integers(0, 200))
def test_no_ranks_of_the_size_taken_keep_more_where_a_delta_weighs_as_it_costs(problem, available):
    energies, cost = problem
    ranks = allocate(energies, cost, available_bytes=available)
    size = nbytes(ranks, cost)
    best = max(kept(energies, r, cost) for r in every_ranks(energies) if nbytes(r, cost) <= size)
    assert kept(energies, ranks, cost) == best


@given(problems(), st.floats(0.01, 1))
def test_no_delta_loses_more_than_the_energy_allows_and_each_would_without_its_last_direction(problem, energy):
    spectra, _ = problem
    energies = energies_of(spectra, {"m1"})
    ranks = for_energy(energies, energy=energy)
    for module, experts in energies.items():
        for expert, values in experts.items():
            rank = ranks[module][expert]
            assert sum(values[rank:].tolist()) <= 1 - energy + 1e-12
            assert rank == 0 or sum(values[rank - 1 :].tolist()) > 1 - energy - 1e-12
            was = spectra[module][expert].tolist()
            whole = sum(was[1:]) / HEAD if module == "m1" and any(was[1:]) else sum(was)
            assert sum(was[rank:]) <= (1 - energy + 1e-12) * whole  # of the squared norm itself


@given(problems())
def test_energies_of_a_delta_add_up_to_one_and_beyond_a_heads_first_to_more(problem):
    spectra, _ = problem
    for module, experts in energies_of(spectra, {"m2"}).items():
        for expert, values in experts.items():
            was = spectra[module][expert]
            head = module == "m2" and bool(was[1:].any())
            assert float(values[head:].sum()) == pytest.approx((HEAD if head else 1) * bool(was.any()))
            torch.testing.assert_close(values * was.sum(), was * values.sum())


@given(problems())
def test_the_smallest_size_gives_every_changed_expert_a_direction(problem):
    energies, cost = problem
    changed = [e for e in energies["m0"] if any(experts[e].any() for experts in energies.values())]

    def served(available):
        ranks = allocate(energies, cost, available_bytes=available)
        return all(any(ranks[m][e] for m in energies) for e in changed)

    smallest = smallest_bytes(energies, cost)
    assert served(smallest)
    assert not changed or not served(smallest - 1)


def test_the_scale_of_a_delta_does_not_matter():
    torch.manual_seed(0)
    spectra = {m: {e: torch.rand(9).double().sort(descending=True).values for e in "ab"} for m in "xyz"}
    cost = {"x": 8, "y": 12, "z": 40}
    scaled = {m: {"a": v["a"] * (2.0**30 if m == "z" else 1), "b": v["b"] * 2.0**-40} for m, v in spectra.items()}
    ranks = [allocate(energies_of(s, {"y"}), cost, available_bytes=500) for s in (spectra, scaled)]
    assert ranks[0] == ranks[1]


ENERGIES = energies_of(
    {
        "small": {"a": torch.tensor([6.0, 2.0]).double(), "b": torch.tensor([0.0, 0.0]).double()},
        "large": {"a": torch.tensor([60.0, 40.0]).double(), "b": torch.tensor([0.0, 0.0]).double()},
        "head": {"a": torch.tensor([999.0, 8.0, 2.0]).double(), "b": torch.tensor([0.0, 0.0, 0.0]).double()},
    },
    heads={"head"},
)
COST = {"small": 10, "large": 30, "head": 20}


def test_by_hand():
    # Energies: small 0.75, 0.25; large 0.6, 0.4; head 199.8, 1.6, 0.4. Of the last two, 0.4, large comes first.
    def ranks(small, large, head):
        return {m: {"a": rank, "b": 0} for m, rank in (("small", small), ("large", large), ("head", head))}

    by_bytes = {
        19: (0, 0, 0),
        39: (0, 0, 1),
        49: (0, 0, 2),
        79: (1, 0, 2),
        80: (1, 1, 2),
        110: (1, 2, 2),
        130: (1, 2, 3),
    }
    for available, wanted in {**by_bytes, 999: (2, 2, 3)}.items():
        assert allocate(ENERGIES, COST, available_bytes=available) == ranks(*wanted)
    for energy, wanted in {0.5: (1, 1, 2), 0.625: (1, 2, 3), 0.75: (1, 2, 3), 0.9: (2, 2, 3)}.items():
        assert for_energy(ENERGIES, energy=energy) == ranks(*wanted)
    assert smallest_bytes(ENERGIES, COST) == 20


def test_no_spectra_need_nothing():
    assert energies_of({}, ()) == {}
    assert allocate({}, {}, available_bytes=5) == {}
    assert for_energy({}, energy=0.5) == {}
    assert smallest_bytes({}, {}) == 0


def test_a_budget_is_a_multiple_of_the_base_and_the_smallest_is_named():
    ranks = within_budget(ENERGIES, COST, budget=1.055, base_bytes=1000, fixed_bytes=1010)
    assert nbytes(ranks, COST) == 40  # of 45 that are left: the next takes 10
    for budget in (1.029, 1.0, 0.5):
        with pytest.raises(ConfigError, match=rf"--budget {budget:g}x cannot be met: the smallest is 1\.030x"):
            within_budget(ENERGIES, COST, budget=budget, base_bytes=1000, fixed_bytes=1010)
    assert nbytes(within_budget(ENERGIES, COST, budget=1.03, base_bytes=1000, fixed_bytes=1010), COST) == 20


@given(st.integers(1, 10**12), st.integers(0, 10**12))
def test_the_smallest_that_an_error_names_can_be_met(base_bytes, fixed_bytes):
    with pytest.raises(ConfigError) as caught:
        within_budget(ENERGIES, COST, budget=1e-15, base_bytes=base_bytes, fixed_bytes=fixed_bytes)
    named = parse_budget(re.findall(r"smallest is (\S+),", str(caught.value))[0])
    within_budget(ENERGIES, COST, budget=named, base_bytes=base_bytes, fixed_bytes=fixed_bytes)


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
        for_energy(ENERGIES, energy=energy)

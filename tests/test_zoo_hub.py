"""Groups whose models are on a Hub, and what their licences come to."""

import itertools
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from zoo.errors import LicenceError
from zoo.hub.licences import combined, front_matter, licence_of

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")


@pytest.fixture
def on_the_hub(hub, groups) -> dict[str, str]:
    """The models of a group of two in repositories with cards; their commits."""
    group = groups(LLAMA, 2)
    sources = {"base": (group.base, "apache-2.0"), **{n: (s, "llama3.1") for n, s in group.experts.items()}}
    commits = {}
    for name, (source, licence) in sources.items():
        card = f"---\nlicense: {licence}\n---\n".encode()
        commits[name] = hub.add(f"org/{name}", {**every_file(Path(source.location)), "README.md": card})
    hub.repos["org/base"].tags["v1"] = commits["base"]
    hub.add("org/base", {"model.safetensors": b"another version"})
    return commits


def test_a_group_on_the_hub_is_pinned_and_its_licences_and_parents_are_pushed(hub, online, on_the_hub, groups, builds):
    """The tag is read, not the branch; the same bytes come out as from directories."""
    experts = ("--expert", "e1=org/e1", "--expert", "e2=org/e2")
    done = online("smile", "made", "--base", "org/base@v1", *experts, "--rank", 8)
    assert done.exit_code == 0, done.output
    made = online.directory / "made"
    local, _ = builds(LLAMA, 2, rank=8)
    assert (made / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    recipe = yaml.safe_load((made / "upscale.yaml").read_text())
    assert recipe["base"] == f"org/base@{on_the_hub['base']}"
    assert recipe["experts"] == {name: f"org/{name}@{on_the_hub[name]}" for name in ("e1", "e2")}
    assert recipe["licences"] == {"base": "apache-2.0", "e1": "llama3.1", "e2": "llama3.1"}
    pushed = online("push", "made", "alice/group")
    assert pushed.exit_code == 0, pushed.output
    assert hub.read("alice/group", "upscale.yaml") == (made / "upscale.yaml").read_bytes()
    card = ModelCard(hub.read("alice/group", "README.md").decode())
    assert card.data.license == "llama3.1"
    assert card.data.base_model == ["org/base", "org/e1", "org/e2"]
    assert card.data.get("base_model_relation") == "merge"
    row = f"| e1 | [org/e1](https://huggingface.co/org/e1) | `{on_the_hub['e1'][:12]}` | llama3.1 | "
    assert row in card.content


def test_an_expert_on_the_hub_is_added_as_if_it_had_been_there(online, on_the_hub):
    base, *experts = ("--base", "org/base@v1"), ("--expert", "e1=org/e1"), ("--expert", "e2=org/e2")
    for args in (
        ("smile", "both", *base, *experts[0], *experts[1], "--rank", 8),
        ("smile", "grown", *base, *experts[0], "--rank", 8),
        ("add", "grown", "e2=org/e2"),
    ):
        done = online(*args)
        assert done.exit_code == 0, done.output
    assert every_file(online.directory / "grown") == every_file(online.directory / "both")


UNREACHABLE = {
    "gated": ("org/gated", "hf_alice", "gated; accept its terms on its page, and log in with `hf auth login` or set"),
    "gated, without a token": ("org/gated", "", "gated; accept its terms on its page"),
    "private": ("bob/private", "hf_alice", "no such model on the Hub; check the spelling, or if it is private: your"),
    "private, without a token": ("bob/private", "", "or if it is private: log in with `hf auth login` or set HF_TOKEN"),
    "missing": ("org/missing", "hf_alice", "no such directory, and no such model on the Hub; check the spelling"),
    "missing revision": ("org/e1@v9", "hf_alice", "the model has no such branch, tag or commit"),
    "no id": ("org/a..b", "hf_alice", "no such directory, and not a Hub id"),
    "a token that is none": ("org/other", "hf_forged", "the Hub wants a token that is valid"),
}


@pytest.mark.parametrize(("model", "token", "message"), UNREACHABLE.values(), ids=list(UNREACHABLE))
def test_what_the_hub_does_not_give_is_one_line_that_names_the_expert(
    hub, online, on_the_hub, groups, model, token, message
):
    config = every_file(Path(groups(LLAMA, 2).base.location))["config.json"]
    hub.add("org/gated", {"config.json": config}, gated=True)
    hub.add("bob/private", {"config.json": config}, private=True)
    hub.add("org/other", {"config.json": config})
    base = groups(LLAMA, 2).base
    done = online("check", "--base", str(base), "--expert", f"mine={model}", token=token)
    assert done.exit_code == 1
    assert_one_message(done.output, message)
    assert f"Error: expert mine: {model}: " in done.output


def test_who_was_granted_access_reads_a_gated_model(hub, online, on_the_hub, groups):
    files = {name: hub.read("org/e1", name) for name in hub.repos["org/e1"].files()}
    hub.add("org/granted", files, gated=True)
    hub.repos["org/granted"].granted.add("alice")
    done = online("check", "--base", str(groups(LLAMA, 2).base), "--expert", "mine=org/granted")
    assert done.exit_code == 0, done.output


# ------------------------------------------------------------------------------------------------------- licences
CHAIN = ("cc0-1.0", "mit", "bsd-3-clause", "apache-2.0")


@pytest.mark.parametrize(
    ("licences", "whole"),
    [
        (["mit"], "mit"),
        (["apache-2.0", "mit", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "llama3.1", "mit"], "llama3.1"),
        (["apache-2.0", "gpl-3.0", "lgpl-3.0"], "gpl-3.0"),
        (["cc-by-4.0", "cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["my-own", "my-own", "mit"], "my-own"),
    ],
)
def test_the_most_restrictive_licence_is_the_wholes(licences, whole):
    for order in itertools.permutations(licences):
        assert combined({f"e{n}": licence for n, licence in enumerate(order)}) == whole


@pytest.mark.parametrize(
    ("licences", "message"),
    [
        (["llama3.1", "gemma"], "which licence? e0: llama3.1, e1: gemma: none of them covers the others"),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], "none of them covers the others; read them and give --licence ID"),
        (["mit", None], "which licence? e0: mit, e1: not said; read what their pages say and give --licence ID"),
        (["mit", "cc-by-nd-4.0"], "e1 may not be changed by its licence"),
        ([], "which licence?"),
    ],
)
def test_where_that_is_not_known_the_question_lists_them(licences, message):
    with pytest.raises(LicenceError) as error:
        combined({f"e{n}": licence for n, licence in enumerate(licences)})
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.lists(st.sampled_from([*CHAIN, "llama3", "gemma", "gpl-3.0", "agpl-3.0", None]), min_size=1, max_size=4))
def test_a_combined_licence_is_a_sources_and_permits_adding_a_permissive_one(licences):
    named = {f"e{n}": licence for n, licence in enumerate(licences)}
    try:
        whole = combined(named)
    except LicenceError:
        with pytest.raises(LicenceError):  # no further source can help
            combined({**named, "more": "mit"})
        return
    assert whole in licences
    assert combined({**named, "free": "cc0-1.0"}) == whole


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: Apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: Qwen-Research\n---\n", "qwen-research"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", None),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("# No metadata", None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_card_says(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


def test_what_is_not_on_the_hubs_list_goes_by_its_name():
    assert front_matter("apache-2.0") == {"license": "apache-2.0"}
    assert front_matter("qwen-research") == {"license": "other", "license_name": "qwen-research"}
    assert front_matter(None) == {}

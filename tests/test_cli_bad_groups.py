"""Group files, names and places that nobody should trust: one clear line, and nothing is made."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli_runs import assert_one_message, upscale
from zoo import Group, GroupError, SourceError

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nbase: *c\nexperts: {e: *c}\n"
FILES = {
    "bomb": (BOMB, "aliases (*name) are not read"),
    "code": ("base: !!python/object/apply:os.system [exit]\nexperts: {e: b}\n", "not YAML: could not determine"),
    "nested": ("base: a\nexperts: " + "[" * 20_000, "not YAML"),
    "large": ("base: a\nexperts: {e: b}\n#" + "x" * (1 << 20), "too large for a group file"),
    "two documents": ("base: a\nexperts: {e: b}\n---\nbase: c\n", "not YAML"),
    "control characters": ("base: a\nexperts: {e: b\x07}\n", "not YAML"),
    "zero byte in a path": ('base: "a\\0b"\nexperts: {e: b}\n', "no such directory, and not a Hub id"),
    "vocabulary": ("base: org/a\nexperts: {e: org/b}\nvocabulary: mine\n", "must be one of base, union"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=list(FILES))
def test_a_bad_group_file_is_one_message(text, message, place):
    (place / "group.yaml").write_text(text)
    result = upscale("smile", place / "group.yaml", "out")
    assert result.exit_code == 1
    assert_one_message(result.output, message)
    assert not list((place / "here").iterdir())


NAMES = [
    "",
    "é",
    "数学",
    "a/b",
    "../a",
    "a b",
    "a;b",
    "$(a)",
    "`a`",
    "a'b",
    'a"b',
    "-a",
    ".a",
    "a\nb",
    "a\0b",
    "🙂",
    "x" * 65,
]


@pytest.mark.parametrize("name", [*NAMES, "base", "auto"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(GroupError, match="expert name"):
        Group.of("org/base", {name: "org/expert"})


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_name_is_plain_or_refused(name):
    try:
        Group.of("org/base", {name: "org/expert"})
    except GroupError:
        return
    assert name.isascii() and all(c.isalnum() or c in "._-" for c in name) and name[0].isalnum()


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_model_s_place_is_parsed_or_refused(text):
    try:
        source = Group.of("org/base", {"e": text}).experts["e"]
    except SourceError as error:
        assert "\n" not in str(error) or "\n" in text
        return
    assert source.is_local or source.location.count("/") <= 1

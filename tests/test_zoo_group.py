import pytest

from zoo import Group, GroupError, Source, SourceError


@pytest.fixture
def zoo_dir(tmp_path):
    for name in ("base", "math", "code"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path


def write(directory, text: str | bytes):
    file = directory / "group.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_yaml_paths_are_relative_to_the_file_and_experts_keep_their_order(zoo_dir, monkeypatch):
    text = "base: models/base\nexperts:\n  math: ./models/math\n  code: models/code\n  web: org/web@v2  # Hub\n"
    file = write(zoo_dir, text)
    elsewhere = zoo_dir / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    group = Group.load(file)
    assert group.base.resolve().samefile(zoo_dir / "models/base")
    assert list(group.experts) == ["math", "code", "web"]
    assert group.experts["math"].resolve().samefile(zoo_dir / "models/math")
    assert group.experts["web"] == Source("org/web", "v2")
    assert Group.load("../group.yaml").experts["math"].resolve().samefile(zoo_dir / "models/math")


def test_inline_paths_are_relative_to_the_working_directory(zoo_dir, monkeypatch):
    monkeypatch.chdir(zoo_dir / "models")
    group = Group.of("base", {"math": "math", "code": zoo_dir / "models/code"})
    assert group.base == Source("base")
    assert group.experts == {"math": Source("math"), "code": Source(str(zoo_dir / "models/code"))}


SHAPE = "a group file holds `base: MODEL` and `experts:` with one `name: MODEL` a line"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", SHAPE),
        ("- base\n- experts\n", SHAPE),
        ("just text", SHAPE),
        ("base: a\n", SHAPE),
        ("experts: {a: b}\n", SHAPE),
        ("base: a\nexperts: {a: b}\nmethod: smile\n", SHAPE),
        ("base: [a]\nexperts: {a: b}\n", SHAPE),
        ("base: a\nexperts: [a, b]\n", SHAPE),
        ("base: a\nexperts:\n", SHAPE),
        ("base: a\nexperts: {e: [b]}\n", "expert 'e': " + SHAPE),
        ("base: a\nexperts: {e: 7}\n", "expert 'e': " + SHAPE),
        ("base: a\nexperts: {7: b}\n", "expert 7: " + SHAPE),
        ("base: a\nexperts: {yes: b}\n", "expert True: " + SHAPE),
        ("base: a: b\n", "not YAML: mapping values are not allowed"),
        ("base: a\nexperts: {e: b\n", "not YAML: .*line 3"),
        ("base: a\n---\nbase: b\n", "not YAML: expected a single document"),
        ("base: 2001-99-99\n", "not YAML: month must be in 1..12"),
        ("base: !!python/name:os.system\n", "not YAML: could not determine a constructor"),
        ("[" * 500, "not YAML: "),  # too deep for some recursion limits, unfinished for others
        ("base: a\nexperts: {e: b, f: c, e: d}\n", "not YAML: 'e' stands there twice; names must differ"),
        ("base: a\nbase: b\nexperts: {e: b}\n", "not YAML: 'base' stands there twice"),
        (b"base: \xff\n", "cannot be read as a group file"),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(GroupError, match=message) as error:
        Group.load(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(GroupError, match=r"cannot be read as a group file \(.*(No such file|Is a directory)"):
        Group.load(tmp_path / name)


@pytest.mark.parametrize("name", ["base", "auto"])
def test_names_that_routing_needs_are_reserved(name):
    with pytest.raises(GroupError, match=f"^expert name '{name}' is reserved; choose another$"):
        Group.of("gpt2", {name: "gpt2"})


@pytest.mark.parametrize("name", ["", "a b", "-a", ".a", "a/b", "a=b", "ä", "a\n"])
def test_names_that_would_not_survive_a_url_or_a_shell_are_refused(name):
    with pytest.raises(GroupError, match=r"use letters, digits, '\.', '_' and '-' only"):
        Group.of("gpt2", {name: "gpt2"})


@pytest.mark.parametrize("name", ["a", "7", "math-v1.2_x", "Base"])
def test_plain_names_are_accepted(name):
    assert list(Group.of("gpt2", {name: "org/ft"}).experts) == [name]


def test_a_group_needs_an_expert(tmp_path):
    with pytest.raises(GroupError, match="at least one expert: name=path or name=org/model"):
        Group.load(write(tmp_path, "base: gpt2\nexperts: {}\n"))


def test_a_model_that_is_nowhere_is_named_with_its_expert(zoo_dir):
    with pytest.raises(SourceError, match=r"^expert code: \./models/cdoe: no such directory"):
        Group.load(write(zoo_dir, "base: models/base\nexperts: {math: models/math, code: ./models/cdoe}\n"))
    with pytest.raises(SourceError, match=r"^\./models/bsae: no such directory"):
        Group.load(write(zoo_dir, "base: ./models/bsae\nexperts: {math: models/math}\n"))

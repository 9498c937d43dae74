import pytest

from zoo import Source, SourceError


@pytest.mark.parametrize(
    ("text", "location", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/model-1.5_b", "org/model-1.5_b", None),
        ("org/model@v1.0", "org/model", "v1.0"),
        ("org/model@refs/pr/7", "org/model", "refs/pr/7"),
    ],
)
def test_a_hub_id_is_what_is_no_directory(text, location, revision):
    source = Source.parse(text)
    assert (source.location, source.revision, source.is_local, str(source)) == (location, revision, False, text)


def test_an_existing_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    for name in ("org/model", "org/model@v1"):
        (tmp_path / name).mkdir(parents=True)
    assert Source.parse("org/model", tmp_path) == Source(str(tmp_path / "org/model"))
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "org/model@v1"):
        source = Source.parse(name)
        assert (source.location, source.revision, source.is_local) == (name, None, True)
        assert source.resolve().samefile(tmp_path / name)


def test_paths_are_relative_to_what_they_are_written_in_and_know_home(tmp_path, monkeypatch):
    (tmp_path / "home/model").mkdir(parents=True)
    (tmp_path / "zoo").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for text in ("~/model", "../home/model", str(tmp_path / "home/model")):
        assert Source.parse(text, tmp_path / "zoo").resolve().samefile(tmp_path / "home/model")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".hidden",
        "./absent",
        "/absent/model",
        "a/b/c",
        "a b",
        "~nobody-of-this-name/x",
        "org/m@",
        "é/m",
        "x" * 400 + "/",
    ],
)
def test_nonsense_is_refused_by_name(text):
    with pytest.raises(
        SourceError, match=r"no such directory, and not a Hub id \(org/name or org/name@revision\)"
    ) as e:
        Source.parse(text)
    assert str(e.value).startswith(text or "''")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match=r"model\.safetensors: no such directory"):
        Source.parse(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("text", ["bsae", "models/llama", "org/model@v1"])
def test_offline_a_misspelt_directory_asks_for_its_spelling(text):
    with pytest.raises(SourceError, match=rf"^{text}: no such directory, and the Hub .*check the spelling of the path"):
        Source.parse(text).resolve()


@pytest.mark.parametrize("text", ["a--b/c", "org/a..b", "org/" + "x" * 97])
def test_what_the_hub_takes_for_no_id_is_one_clear_error(text):
    with pytest.raises(SourceError, match="no such directory, and not a Hub id"):
        Source.parse(text).resolve()

"""The ready group files: each loads, says how it is used and what to expect, and is copied, never over another file."""

import re
import shlex

import click
import pytest
from huggingface_hub.utils import validate_repo_id

from tests.cli_runs import assert_one_message
from tests.cli_runs import upscale as command
from upscale.cli import main
from zoo import Group
from zoo.recipes import recipes

RECIPES = recipes()
DOUBT = "nothing was downloaded, and this file was checked by its schema only."


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_a_group_that_explains_itself(recipe):
    group = Group.load(recipe.file)
    for source in group.experts.values():
        validate_repo_id(source.location)
        assert "/" in source.location
    comment, _, content = recipe.file.read_text().partition("base: ")
    assert "#" not in content and all(line.startswith("#") for line in comment.splitlines() if line != "vocabulary")
    assert recipe.expect.endswith(".") and "#" not in recipe.expect
    assert re.search(r"\d\d\.\d", recipe.expect) or "no published score" in recipe.expect
    assert "# Source: " in comment and DOUBT in comment
    if "/" not in group.base.location:  # made by the first command
        assert f"save_pretrained('{group.base.location}')" in comment
    lines = [shlex.split(line[1:]) for line in comment.splitlines() if line.startswith("#   upscale ")]
    assert {words[1] for words in lines} >= {"check", "smile"}
    for _, verb, file, *options in lines:
        assert file == f"{recipe.name}.yaml"
        verb_command = main.get_command(click.Context(main), verb)
        assert verb_command is not None
        verb_command.make_context(verb, [file, *options])  # every option is one, with a value that it takes


def test_the_published_experiments_and_families_are_there():
    experts = {recipe.name: len(recipe.group.experts) for recipe in RECIPES}
    assert experts["clip-vit-b-32"] == experts["flan-t5-glue"] == experts["flan-t5-glue-lora"] == 8
    assert experts["mistral-7b"] == 3 and experts["llama-3.2-3b"] == 5
    assert any(name.startswith("qwen2.5") for name in experts)


def test_recipes_are_listed_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = command("recipes")
    assert listed.exit_code == 0 and all(recipe.name in listed.output for recipe in RECIPES)
    assert command("recipes", "mistral-7b").exit_code == 0
    assert command("recipes", "mistral-7b", "mine.yaml").exit_code == 0
    expected = next(recipe.file for recipe in RECIPES if recipe.name == "mistral-7b").read_bytes()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("mistral-7b.yaml", "mine.yaml"), expected
    )
    (tmp_path / "mine.yaml").write_text("mine")
    for args, message in (
        (["mistral-7b", "mine.yaml"], "mine.yaml: exists already"),
        (["mistral-7b", "absent/mine.yaml"], "cannot be written: No such file"),
        (["mistral"], "no recipe 'mistral'; there are clip-vit-b-32, flan-t5-glue"),
        (["../recipes/mistral-7b"], "no recipe"),
    ):
        result = command("recipes", *args)
        assert result.exit_code == 1
        assert_one_message(result.output, message)
    assert (tmp_path / "mine.yaml").read_text() == "mine"

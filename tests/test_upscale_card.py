"""The model card: what it says is what the checkpoint's files say, and what it tells to run runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from tests.architectures import TABLE
from upscale.evaluating.results import Result, to_json
from upscale.publishing.card import MADE, card
from upscale.publishing.publish import pack

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
COMMIT = "0123456789" * 4


@pytest.fixture
def checkpoint(builds, tmp_path) -> Path:
    return shutil.copytree(builds(LLAMA, 2, rank=8)[0], tmp_path / "out")


def files(checkpoint: Path) -> tuple[dict, dict, dict]:
    config, report = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("config", "report"))
    return config, yaml.safe_load((checkpoint / "upscale.yaml").read_text()), report


def row(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def result(model: str, task: str, score: float, metric: str = "accuracy") -> Result:
    rows = [{"answer": "secret", "accuracy": score}]
    return Result(model, task, metric, score, 1, None, "transformers", 1.0, 0.1, 0.9, {}, None, 10, None, rows, "key")


def test_the_card_of_a_build_names_sources_sizes_and_energies(checkpoint, builds):
    config, recipe, report = files(checkpoint)
    said = (checkpoint / "README.md").read_text()
    assert said == card(config, recipe, report)
    data = ModelCard(said).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)
    assert data.tags == ["merge", "moe", "smile", "upscale-zoo"] and data.base_model is None
    kept = builds(LLAMA, 2, rank=8)[1].energy
    for name in ("e1", "e2"):
        assert row(said, name) == [name, name, f"`{recipe['sha256'][name][:12]}`", "", f"{kept[name]:.1%}"]
    assert str(checkpoint.parent) not in said and recipe["base"] not in said
    sizes = [report[f"{what}_bytes"] for what in ("result", "base", "group")]
    assert f"Size: {sizes[0] / 1e6:.1f} MB, {sizes[0] / sizes[1]:.2f}x the base" in said
    assert f"it keeps {min(kept.values()):.0%} or more" in said


def test_parents_on_the_hub_make_the_metadata(checkpoint):
    config, recipe, report = files(checkpoint)
    recipe["base"] = f"org/base@{COMMIT}"
    recipe["experts"] = {"e1": f"org/tune@{COMMIT}", "e2": f"org/base@{COMMIT}"}
    recipe["licences"] = {"base": "apache-2.0", "e1": "mit", "e2": "apache-2.0"}
    said = card(config, recipe, report, name="org/both")
    data = ModelCard(said).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (["org/base", "org/tune"], "merge")
    assert data["license"] == "apache-2.0" and "model-index" not in data
    assert row(said, "e1")[1:4] == ["[org/tune](https://huggingface.co/org/tune)", f"`{COMMIT[:12]}`", "mit"]
    assert said.partition("---\n\n")[2].startswith("# both\n")


@pytest.mark.parametrize("block", [0, 1])
def test_the_code_of_the_card_runs(checkpoint, block):
    config, recipe, report = files(checkpoint)
    code = re.findall(r"```python\n(.*?)```", card(config, recipe, report, name=str(checkpoint)), re.DOTALL)
    assert len(code) == 2
    names: dict = {}
    exec(code[block], names)
    with torch.no_grad():
        logits = names["model"](input_ids=torch.tensor([[0, 5, 9]])).logits
    assert logits.shape == (1, 3, 259) and logits.isfinite().all()


def test_results_and_pictures_of_the_directory_come_into_the_card_and_rows_stay(checkpoint):
    results = [result("base", "dates", 0.25), result("mine", "dates", 0.5), result("mine", "text", 3.5, "perplexity")]
    written = {"version": 1, **to_json(results), "earlier": to_json(results)["results"]}
    (checkpoint / "eval.json").write_text(json.dumps(written))
    (checkpoint / "routing.png").write_bytes(b"png")
    parcel = pack(checkpoint, "org/both", "mit")
    index = ModelCard(parcel.card).data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in index] == [
        ("dates", "accuracy", 0.5),
        ("text", "perplexity", 3.5),
    ]
    assert "| mine | 0.500" in parcel.card and "![routing](routing.png)" in parcel.card
    sent = json.loads(parcel.files["eval.json"])
    assert "secret" not in parcel.files["eval.json"].decode() and sent["earlier"] == []
    assert sent["results"] == [{**r, "rows": []} for r in written["results"]] and sent["models"] == written["models"]
    two = [*results, result("other", "dates", 0.75)]  # which of them is this one, nobody knows
    assert "model-index" not in card(*files(checkpoint), name="org/both", results=two)


def test_a_card_without_its_last_line_is_the_users_own(checkpoint):
    own = "---\nlicense: mit\ntags: [mine]\n---\n# Mine\n"
    (checkpoint / "README.md").write_text(own)
    kept = pack(checkpoint, "org/both")
    assert (kept.card, kept.licence) == (own, "mit")
    given = pack(checkpoint, "org/both", "qwen-research")
    data = ModelCard(given.card).data.to_dict()
    assert (data["license"], data["license_name"], data["tags"]) == ("other", "qwen-research", ["mine"])
    assert ModelCard(given.card).text.strip() == "# Mine"
    (checkpoint / "README.md").write_text(f"# Anything\n\n{MADE}\n")
    assert "# both" in pack(checkpoint, "org/both", "mit").card


def test_a_settings_file_that_names_the_users_home_is_pointed_out(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "somebody/base")}))
    notes = pack(checkpoint, "org/both", "mit").notes
    assert "config.json names your home directory, which everybody will read" in notes
    assert not any(note.startswith("upscale.yaml names") for note in notes)

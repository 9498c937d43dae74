"""`upscale verify`: what is sound passes, with figures that plain code gives too, and wrong sources do not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import upscale
from tests.adapters import save_adapter
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, group_file
from tests.cli_runs import upscale as command
from tests.damage import Q, failed, flip
from tests.routers import copied, give_router, random_router
from upscale import verify
from zoo import Group

LLAMA, QWEN2, _, GPT2 = TABLE[:4]


@pytest.fixture
def plain(builds, tmp_path) -> Path:
    """A copy of a checkpoint in one file, to change."""
    return copied(builds(LLAMA, 3, rank=8)[0], tmp_path / "out")


def statuses(report) -> dict[str, str]:
    return {finding.check: finding.status for finding in report.findings}


# ------------------------------------------------------------------------------------------------------ what is sound
def test_a_smile_model_and_what_its_experts_keep(builds, groups):
    """Against the same sums in plain code, from the files."""
    out, group = builds(LLAMA, 3, rank=8)[0], groups(LLAMA, 3)
    report = verify(out, group, engine="transformers")
    assert statuses(report) == {check: "skipped" if check == "vllm" else "ok" for check in statuses(report)}
    stored, base = load_file(out / "model.safetensors"), load_file(Path(str(group.base)) / "model.safetensors")
    for number, (name, source) in enumerate(group.experts.items()):
        own, total, missing = load_file(Path(str(source)) / "model.safetensors"), 0.0, 0.0
        for module, layout in json.loads((out / "config.json").read_text())["upscale"]["modules"].items():
            if layout.get("kind") == "norm":
                continue
            delta = (own[f"{module}.weight"] - base[f"{module}.weight"]).double()
            begin = sum(layout["ranks"][:number])
            part = slice(begin, begin + layout["ranks"][number])
            down, up = stored[f"{module}.experts.down"][part].double(), stored[f"{module}.experts.up"][:, part].double()
            total += float(delta.square().sum())
            missing += float((delta - up @ down).square().sum())
        assert report.experts[name].energy == pytest.approx(1 - missing / total, abs=1e-6)
        assert report.experts[name].reported == pytest.approx(1 - missing / total, abs=1e-5)


def test_all_other_kinds_are_sound(builds, wemoes, groups, tmp_path):
    calibrated = copied(builds(LLAMA, 3, rank=8)[0], tmp_path / "calibrated")
    give_router(calibrated, random_router(259), granularity="prompt")
    base = groups(LLAMA, 3).base
    options = {"r": 4, "target_modules": "all-linear"}
    lora = Group.of(
        str(base), {f"l{n}": save_adapter(Path(str(base)), tmp_path / f"l{n}", n, **options) for n in (1, 2)}
    )
    upscale.smile(lora, tmp_path / "lora", rank=4, router_rank=4)
    averaged = tmp_path / "averaged"  # a tied head apart from the embedding, which is another for it
    upscale.smile(groups(QWEN2, 3), averaged, rank=8, rest="average", lm_head=True, dtype="bfloat16")
    for out, group in (
        (builds(QWEN2, 3, rank=8)[0], groups(QWEN2, 3)),  # a tied head
        (builds(GPT2, 3, rank=8)[0], groups(GPT2, 3)),  # weights the other way, norms with biases
        (averaged, groups(QWEN2, 3)),
        (wemoes(GPT2, vectors="dense"), groups(GPT2, 3)),
        (wemoes(LLAMA, vectors="sparse"), groups(LLAMA, 3)),
        (wemoes(GPT2, vectors="rank-one", rank=8), groups(GPT2, 3)),  # biases merged
        (calibrated, groups(LLAMA, 3)),
        (tmp_path / "lora", lora),
    ):
        report = verify(out, group, engine="none")
        assert report.ok, (out, report.problems)
        assert len(report.experts) == len(group.experts)
    assert min(own.energy for own in report.experts.values()) == pytest.approx(1, abs=1e-9)  # of LoRA, all


def test_a_classifier_is_loaded_but_not_asked(tmp_path):
    def saved(name, labels):
        torch.manual_seed(labels)
        sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=48, num_labels=labels)).save_pretrained(
            tmp_path / name
        )
        return tmp_path / name

    group = Group.of(saved("base", 2), {"a": saved("a", 3), "b": saved("b", 4)})
    upscale.smile(group, tmp_path / "out", rank=4, router_rank=2)
    report = verify(tmp_path / "out", group)
    assert report.ok, report.problems
    assert report["transformers"].detail.endswith("nothing was asked: no decoder, whose texts could be scored")
    assert report["vllm"].status == "skipped"
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["upscale"]["heads"] = dict(reversed(config["upscale"]["heads"].items()))
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert (
        "tensor heads.0.classifier.weight has shape [3, 32], config.json says [4, 32]"
        in verify(tmp_path / "out", engine="none").problems
    )


def test_what_transformers_saved_has_nothing_to_compare_with(plain, tmp_path):
    upscale.load(plain).save_pretrained(tmp_path / "saved")
    report = verify(tmp_path / "saved", engine="transformers")
    assert report.ok, report.problems
    assert {c for c, s in statuses(report).items() if s == "skipped"} >= {"hashes", "recipe"}
    assert report["card"].status == "warning"
    assert report["transformers"].detail.endswith("nothing was asked: no tokenizer")


def test_the_wrong_sources_are_told_from_the_right_ones(builds, groups, plain):
    right = groups(LLAMA, 3)
    e1, e2, e3 = map(str, right.experts.values())
    swapped = verify(plain, Group.of(str(right.base), {"e1": e2, "e2": e1, "e3": e3}), engine="none")
    assert failed(swapped).keys() == {"sources", "experts"}
    assert {line.split(":")[0] for line in swapped["experts"].problems} == {"expert e1", "expert e2"}
    assert len(swapped["sources"].problems) == 2
    rebased = verify(plain, Group.of(e3, {"e1": e1, "e2": e2, "e3": str(right.base)}), engine="none")
    assert f"tensor {Q}.weight is not the base's" in rebased["base"].problems
    others = verify(plain, Group.of(str(right.base), {"e1": e1}), engine="none")
    assert failed(others) == {"sources": ["the group has experts e1; the checkpoint has e1, e2, e3"]}
    foreign = verify(plain, groups(GPT2, 3), engine="none")
    assert failed(foreign).keys() == {"sources", "base"} and foreign["experts"].detail == "needs base"
    misfit = verify(
        plain, Group.of(str(right.base), {"e1": str(groups(GPT2, 3).base), "e2": e2, "e3": e3}), engine="none"
    )
    assert "expert e1: architecture gpt2 is not the base's llama" in misfit["sources"].problems[0]


def test_a_report_that_lies_is_found(plain, groups, tmp_path):
    """Also one that is silent about what an expert changed and nobody kept."""
    file = plain / "report.json"
    report = json.loads(file.read_text())
    module = next(module for module in report["modules"] if module["name"] == Q)
    module["left"]["e2"] *= 0.999
    file.write_text(json.dumps(report))
    found = verify(plain, groups(LLAMA, 3), engine="none")
    assert failed(found).keys() == {"hashes", "experts"}
    (line,) = found["experts"].problems
    assert line.startswith(f"expert e2: {Q}.weight: ") and "is missing, report.json says" in line
    upscale.smile(groups(LLAMA, 3), tmp_path / "lost", rank=8, rest="base")
    assert verify(tmp_path / "lost", groups(LLAMA, 3), engine="none").ok
    file = tmp_path / "lost/report.json"
    report = json.loads(file.read_text())
    report["rest"] = [tensor for tensor in report["rest"] if tensor["name"] != "model.norm.weight"]
    file.write_text(json.dumps(report))
    lines = verify(tmp_path / "lost", groups(LLAMA, 3), engine="none")["experts"].problems
    assert [line.split(":")[1] for line in lines] == [" model.norm.weight"] * 3


# ------------------------------------------------------------------------------------------------------- the command
def test_the_command_shows_and_writes_the_report(plain, groups, tmp_path):
    done = command("verify", plain, "--engine", "none", "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
    (plain / "README.md").write_text("---\nlicense: [\n---\n")
    flip(plain, f"{Q}.weight")
    group = group_file(groups(LLAMA, 3), tmp_path / "group.yaml")
    done = command("verify", plain, "--engine", "none", "--against", group, "--json", tmp_path / "report.json")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "2 problems; fetch it or build it again" in done.output and "Experts against their sources" in done.output
    report = json.loads((tmp_path / "report.json").read_text())
    named = {finding["check"]: (finding["status"], finding["problems"]) for finding in report["findings"]}
    assert named["hashes"] == ("failed", [f"tensor {Q}.weight is not what checksums.json says"])
    assert named["base"] == ("failed", [f"tensor {Q}.weight is not the base's"])
    assert named["card"][0] == "warning" and "README.md: its metadata cannot be read" in named["card"][1][0]
    assert report["experts"].keys() == {"e1", "e2", "e3"}
    for args, message in (
        ((groups(LLAMA, 3).base,), "a plain model, without experts; give an upscaled one"),
        ((plain, "--json", tmp_path / "no" / "file"), "no file can be written there"),
        ((plain, "--expert", "e9"), "no expert e9 in this model; it has e1, e2, e3 and base"),
    ):
        done = command("verify", *map(str, args))
        assert done.exit_code == 1
        assert_one_message(done.output, message)

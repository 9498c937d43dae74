"""One expert taken out of an upscaled checkpoint, as a model and as a LoRA adapter, against transformers and PEFT."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import upscale
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message
from tests.cli_runs import upscale as command
from tests.conftest import perturbed, save_model
from tests.vllm_runs import prompts
from upscale.growing.extract import extract_lora, extract_model
from zoo import Checkpoint, Group

FULL = 1000  # clamped: full rank
INPUTS = [torch.tensor([ids]) for ids in prompts((7, 30))]
LLAMA, QWEN2, GPT2 = (next(a for a in TABLE if a.name == name) for name in ("llama", "qwen2", "gpt2"))


def assert_same(one, other, tolerance=1e-4):
    with torch.no_grad():
        for ids in INPUTS:
            torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=tolerance, rtol=tolerance)


def of_linears(name):
    """Weights of linears inside the blocks."""
    return ".weight" in name and not any(word in name for word in ("norm", "ln_", "embed", "wte", "wpe", "lm_head"))


def linear_group(architecture, root):
    """A group whose experts changed nothing but what a LoRA holds; the second not everywhere."""
    base = save_model(architecture.model(seed=0), root / "base")
    part = perturbed(architecture, 2, names=lambda name: of_linears(name) and ".1." in name)
    tunes = {"whole": perturbed(architecture, 1, names=of_linears), "part": part}
    return Group.of(base, {name: save_model(model, root / name) for name, model in tunes.items()})


def test_an_expert_as_a_model_is_what_the_forced_model_computes(architecture, builds, groups, tmp_path):
    out, _ = builds(architecture, 2, rank=FULL)
    extract_model(out, "e2", tmp_path / "e2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e2")
    assert type(model).__name__ == json.loads((tmp_path / "e2/config.json").read_text())["architectures"][0]
    assert_same(model, upscale.load(out, expert="e2"))
    assert_same(model, AutoModelForCausalLM.from_pretrained(str(groups(architecture, 2).experts["e2"])), 1e-3)
    assert {"tokenizer.json", "README.md", "checksums.json"} <= {path.name for path in (tmp_path / "e2").iterdir()}
    extract_model(out, "base", tmp_path / "base")
    was, found = (Checkpoint.open(path) for path in (str(groups(architecture, 2).base), tmp_path / "base"))
    assert found.config == was.config and found.tensors == was.tensors
    assert all(torch.equal(found.read(name), was.read(name)) for name in was.tensors)


def test_what_is_cut_off_is_cut_off_in_the_model_too(builds, wemoes, tmp_path):
    low, _ = builds(QWEN2, 2, rank=4, router_rank=2, rest="base", lm_head=True)  # a tied head with factors of its own
    idle, _ = builds(QWEN2, 2, rank=4, router_rank=2, exclude=("lm_head",))  # and one without, of an embedding with
    for number, out in enumerate((low, idle, wemoes(LLAMA, vectors="dense"), wemoes(LLAMA, vectors="sparse"))):
        result = command("extract", out, "e1", tmp_path / f"{number}", "--as", "model")
        assert result.exit_code == 0, result.output
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}"), upscale.load(out, expert="e1"))


def test_a_classifier_keeps_its_own_head_and_classes(tmp_path):
    def model(labels, seed):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        config.id2label = {n: f"{labels}-{n}" for n in range(labels)}
        return BertForSequenceClassification(config).eval()

    model(2, 0).save_pretrained(tmp_path / "base")
    model(3, 1).save_pretrained(tmp_path / "tune")
    upscale.smile(Group.of(tmp_path / "base", {"three": tmp_path / "tune"}), tmp_path / "out", rank=FULL)
    extract_model(tmp_path / "out", "three", tmp_path / "three")
    found = BertForSequenceClassification.from_pretrained(tmp_path / "three").eval()
    assert found.config.id2label == {0: "3-0", 1: "3-1", 2: "3-2"}
    with torch.no_grad():
        ids, forced = torch.arange(12)[None], upscale.load(tmp_path / "out", expert="three")
        torch.testing.assert_close(found(ids).logits, forced(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)
def test_peft_computes_with_the_adapter_what_the_forced_model_computes(architecture, tmp_path):
    group, out = linear_group(architecture, tmp_path), tmp_path / "out"
    upscale.smile(group, out, energy=0.9, router_rank=1, rest="base")
    for name in group.experts:
        taken = extract_lora(out, name, tmp_path / f"lora-{name}")
        assert not taken.left_out and taken.kept == 1
        base = AutoModelForCausalLM.from_pretrained(str(group.base))
        adapted = PeftModel.from_pretrained(base, str(tmp_path / f"lora-{name}"))
        assert_same(adapted, upscale.load(out, expert=name), 1e-5)
        settings = json.loads((tmp_path / f"lora-{name}/adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(group.base)
        ranks = {settings["rank_pattern"].get(module, settings["r"]) for module in settings["target_modules"]}
        assert len(ranks) > 1 and max(ranks) == settings["r"]
    # and the adapters are experts again, of the same ranks
    again = Group.of(group.base.location, {name: tmp_path / f"lora-{name}" for name in group.experts})
    upscale.smile(again, tmp_path / "again", rank=FULL, rest="base")
    for name in group.experts:
        assert_same(upscale.load(tmp_path / "again", expert=name), upscale.load(out, expert=name), 1e-5)
    ranks = [json.loads((d / "config.json").read_text())["upscale"]["modules"] for d in (out, tmp_path / "again")]
    assert {n: m["ranks"] for n, m in ranks[0].items()} == {n: m["ranks"] for n, m in ranks[1].items()}


def test_what_a_lora_cannot_hold_is_named_with_its_norm(builds, groups, tmp_path):
    out, _ = builds(QWEN2, 2, rank=FULL)
    result = command("extract", out, "e1", tmp_path / "lora", "--as", "lora")
    assert result.exit_code == 0 and result.output.count("warning") == 1
    taken = extract_lora(out, "e1", tmp_path / "again")
    base, tune = (Checkpoint.open(str(source)) for source in (groups(QWEN2, 2).base, groups(QWEN2, 2).experts["e1"]))
    linears = {name for name in base.tensors if of_linears(name) and base.tensors[name].shape[1:]}
    assert taken.left_out.keys() == base.tensors.keys() - linears
    for name, norm in taken.left_out.items():
        assert norm == pytest.approx(float((tune.read(name) - base.read(name)).norm()), rel=1e-3)
        assert f"| `{name}` | {norm:.4g} |" in (tmp_path / "lora/README.md").read_text()
    lost, held = (
        sum(float((tune.read(n) - base.read(n)).square().sum()) for n in names) for names in (taken.left_out, linears)
    )
    assert taken.kept == pytest.approx(held / (held + lost), rel=1e-3)
    assert f"{taken.kept:.0%}" in result.output
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    for name in linears:
        a, b = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, tune.read(name) - base.read(name), atol=1e-5, rtol=1e-5)


def test_a_hub_base_is_named_with_its_commit_and_that_of_an_import_not_at_all(builds, tmp_path):
    out, _ = builds(LLAMA, 2, rank=4, router_rank=2)
    copy = shutil.copytree(out, tmp_path / "copy")
    recipe = yaml.safe_load((copy / "upscale.yaml").read_text())
    hub = {**recipe, "base": f"org/base@{'a1' * 20}"}
    for changed, named in ((hub, ("org/base", "a1" * 20)), ({**recipe, "imported": {}}, (None, None))):
        (copy / "upscale.yaml").write_text(yaml.safe_dump(changed))
        extract_lora(copy, "e1", tmp_path / str(named[0]))
        settings = json.loads((tmp_path / str(named[0]) / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == named
        assert ("base_model: org/base\n" in (tmp_path / str(named[0]) / "README.md").read_text()) == bool(named[0])


def test_what_cannot_be_taken_out_is_refused_in_one_line(builds, wemoes, groups, tmp_path):
    out, _ = builds(LLAMA, 2, rank=4, router_rank=2)
    averaged, _ = builds(LLAMA, 2, rank=4, router_rank=2, rest="average")
    (tmp_path / "there").mkdir()
    for args, message in (
        ((out, "e3", tmp_path / "x", "--as", "lora"), "no expert e3 in this model; it has e1, e2"),
        ((str(groups(LLAMA, 2).base), "e1", tmp_path / "x", "--as", "model"), "a plain model"),
        ((wemoes(LLAMA), "e1", tmp_path / "x", "--as", "lora"), "a merge of the group"),
        ((wemoes(LLAMA, vectors="dense"), "e1", tmp_path / "x", "--as", "lora"), "not as factors"),
        ((averaged, "e1", tmp_path / "x", "--as", "lora"), "a merge of the group"),
        ((out, "e1", tmp_path / "there", "--as", "lora"), "exists already"),
        ((tmp_path / "nowhere", "e1", tmp_path / "x", "--as", "model"), "no such directory"),
    ):
        result = command("extract", *args)
        assert result.exit_code == 1, args
        assert_one_message(result.output, message)
    assert {path.name for path in tmp_path.iterdir()} == {"there"}

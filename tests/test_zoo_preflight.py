import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import TABLE
from zoo import CheckpointError, Group, MismatchError, SourceError, check

ROWS = {row.name: row for row in TABLE}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def variant(groups, tmp_path):
    """A copy of a tiny llama fine-tune (or of another row's), with its tensors or its configuration changed."""

    def make(name: str, *, tensors=None, config=None, row: str = "llama") -> Path:
        source, out = Path(groups(ROWS[row]).experts["e1"].location), tmp_path / name
        out.mkdir()
        state = load_file(source / "model.safetensors") | (tensors or {})
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, out / "model.safetensors")
        settings = json.loads((source / "config.json").read_text()) | (config or {})
        (out / "config.json").write_text(json.dumps(settings))
        (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        return out

    return make


def group_of(groups, row: str = "llama", **experts) -> Group:
    return Group.of(groups(ROWS[row]).base.location, experts)


def test_every_row_of_the_table_fits_together(groups, architecture):
    group = groups(architecture)
    verdict = check(group)
    assert (verdict.mismatches, verdict.warnings) == ((), ())
    assert list(verdict.experts) == list(group.experts)
    assert verdict.base.tensors.keys() == load_file(Path(group.base.location) / "model.safetensors").keys()
    verdict.require()


def test_another_float_format_is_no_mismatch(groups, variant):
    half = variant("half", tensors={Q_PROJ: torch.zeros(128, 64, dtype=torch.bfloat16)})
    assert check(group_of(groups, half=half)).mismatches == ()


MISMATCHES = {
    "architecture": (
        {"row": "mistral"},
        ["expert e: architecture mistral is not the base's llama; it was not fine-tuned from this base"],
    ),
    "shape": (
        {"tensors": {Q_PROJ: torch.zeros(128, 32)}},
        [f"expert e: {Q_PROJ} has shape [128, 32], the base's is [128, 64]"],
    ),
    "vocabulary": (
        {"tensors": {"model.embed_tokens.weight": torch.zeros(260, 64), "lm_head.weight": torch.zeros(260, 64)}},
        [
            "expert e: vocabulary differs: 260 rows in model.embed_tokens.weight, the base has 259; "
            "pass --vocabulary base to keep the base's rows, or --vocabulary union to keep all"
        ],
    ),
    "missing": (
        {"tensors": {Q_PROJ: None, "model.norm.weight": None}},
        [f"expert e: lacks {Q_PROJ}, model.norm.weight"],
    ),
    "extra": (
        {"tensors": {f"model.extra.{n}": torch.zeros(1) for n in range(7)}},
        [f"expert e: has, the base has not: {', '.join(f'model.extra.{n}' for n in range(5))} and 2 more"],
    ),
    "no head": (
        {"tensors": {"lm_head.weight": None, "model.norm.weight": None, "x": torch.zeros(1)}},
        ["expert e: lacks lm_head.weight, model.norm.weight", "expert e: has, the base has not: x"],
    ),
    "integers": (
        {"tensors": {Q_PROJ: torch.zeros(128, 64, dtype=torch.int8)}},
        [f"expert e: tensor {Q_PROJ} is torch.int8, not a float of 16 bits or more"],
    ),
    "quantised": (
        {"config": {"quantization_config": {"quant_method": "awq"}}},
        ["expert e: weights are quantised (awq); use the unquantised model, and quantise the result"],
    ),
    "remote code": (
        {"config": {"auto_map": {"AutoModelForCausalLM": "own.Model"}}},
        ["expert e: needs remote code (auto_map), which cannot be upscaled"],
    ),
    "no type": ({"config": {"model_type": None}}, ["expert e: config.json has no model_type"]),
}


@pytest.mark.parametrize(("change", "lines"), MISMATCHES.values(), ids=list(MISMATCHES))
def test_a_mismatch_is_named(groups, variant, change, lines):
    verdict = check(group_of(groups, fine=groups(ROWS["llama"]).experts["e2"], e=variant("e", **change)))
    assert list(verdict.mismatches) == lines
    with pytest.raises(MismatchError) as error:
        verdict.require()
    assert error.value.mismatches == lines


def test_a_saved_copy_of_a_tied_head_and_saved_buffers_are_no_mismatch(groups, variant):
    copy = {"lm_head.weight": torch.zeros(259, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    assert check(group_of(groups, "qwen2", e=variant("e", row="qwen2", tensors=copy))).mismatches == ()
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    assert check(group_of(groups, "gpt2", g=variant("g", row="gpt2", tensors=masks))).mismatches == ()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": None}, "base: config.json has no model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "base: weights are quantised (gptq); use the unquantised"),
    ],
)
def test_the_base_is_checked_too(groups, variant, config, line):
    experts = {"e1": groups(ROWS["llama"]).experts["e1"], "e2": variant("e2", config={"auto_map": {}})}
    ours, theirs = check(Group.of(variant("base", config=config), experts)).mismatches
    assert ours.startswith(line)
    assert theirs.startswith("expert e2: needs remote code")


def test_an_upscaled_model_is_told_apart(groups, builds):
    out, _ = builds(ROWS["llama"])
    (line,) = check(group_of(groups, e=out)).mismatches
    assert line == "expert e: is an upscaled model already; give the models that it was built from"


def test_every_mismatch_of_every_expert_is_listed_at_once(groups, variant):
    changes = ("shape", "vocabulary", "architecture", "missing", "quantised")
    experts = {f"e{n}": variant(f"e{n}", **MISMATCHES[change][0]) for n, change in enumerate(changes)}
    wanted = [line.replace("expert e", f"expert e{n}") for n, c in enumerate(changes) for line in MISMATCHES[c][1]]
    assert list(check(group_of(groups, **experts)).mismatches) == wanted
    assert len(wanted) == 5


def test_many_mismatches_of_one_expert_are_counted(groups, variant):
    state = load_file(variant("whole") / "model.safetensors")
    cut = {name: tensor[..., :-1].contiguous() for name, tensor in state.items()}
    lines = check(group_of(groups, e=variant("e", tensors=cut))).mismatches
    assert len(lines) == 6
    assert lines[-1] == f"expert e: and {len(state) - 5} more"


@pytest.mark.parametrize(("file", "what"), [("tokenizer.json", "tokenizer"), ("chat_template.jinja", "chat template")])
def test_another_tokenizer_or_template_is_only_a_warning(groups, variant, file, what):
    expert = variant("e")
    (expert / file).write_text("{}")
    verdict = check(group_of(groups, e=expert))
    assert verdict.mismatches == ()
    assert verdict.warnings == (f"expert e: {what} differs from the base's, which the result keeps",)


def test_what_cannot_be_opened_is_named_with_its_expert(groups, variant):
    (broken := variant("broken")).joinpath("config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^expert broken: .*/broken: not a model directory \(no config.json\)"):
        check(group_of(groups, broken=broken))
    with pytest.raises(SourceError, match=r"^expert typo: org/typo: no such directory"):
        check(group_of(groups, typo="org/typo"))

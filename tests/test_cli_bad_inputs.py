"""Whatever a user, or a stranger's model, hands in: one clear line, nothing half-made, nothing written elsewhere."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.adapters import save_adapter
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file, upscale
from tests.conftest import perturbed, save_model
from zoo import Checkpoint, CheckpointError, Group, ZooError, check

LLAMA = TABLE[0]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A base, a fine-tune of it in one file, one in shards, and a LoRA."""
    root = tmp_path_factory.mktemp("models")
    base = save_model(LLAMA.model(seed=0), root / "base")
    save_model(perturbed(LLAMA, 1), root / "single")
    perturbed(LLAMA, 2).save_pretrained(root / "sharded", max_shard_size="150KB")
    save_adapter(base, root / "lora", target_modules=["q_proj"])
    return {name: root / name for name in ("base", "single", "sharded", "lora")}


def edit(name: str, **changes) -> Callable[[Path], None]:
    """Change fields of a JSON file."""

    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrite a safetensors header, whatever becomes of it."""

    def rewrite(model: Path) -> None:
        data = (model / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + length])
        changed = change(content)
        text = changed if isinstance(changed, bytes) else json.dumps(content).encode()
        (model / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


def length(number: int) -> Callable[[Path], None]:
    """Claim another length of the header."""
    return lambda model: (
        (model / SINGLE).write_bytes(struct.pack("<Q", number) + (model / SINGLE).read_bytes()[8:]) and None
    )


def weight_map(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite(model: Path) -> None:
        content = json.loads((model / INDEX).read_text())
        change(content["weight_map"])
        (model / INDEX).write_text(json.dumps(content))

    return rewrite


def moved(file: str) -> Callable[[Path], None]:
    """Let the index name a shard that lies beside the model's directory."""

    def move(model: Path) -> None:
        outside = model.parent / "outside.safetensors"
        shutil.copy(next(model.glob("*.safetensors")), outside)
        named = file.format(outside=outside)
        weight_map(lambda names: names.update({next(iter(names)): named}))(model)

    return move


def linked(name: str) -> Callable[[Path], None]:
    """Replace a file by a link out of the directory."""

    def link(model: Path) -> None:
        outside = model.parent / "secret"
        shutil.copy(model / name, outside)
        (model / name).unlink()
        (model / name).symlink_to(outside)

    return link


def looped(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")


def piped(name: str) -> Callable[[Path], None]:
    def pipe(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return pipe


def twice(content: dict) -> bytes:
    text = json.dumps(content)
    return (text[:-1] + f', "{NORM}": {json.dumps(content[NORM])}' + "}").encode()


def pickled(model: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(model.parent / "run"),)

    torch.save({"w": Evil()}, model / "pytorch_model.bin")
    (model / SINGLE).unlink()


def of(key: str, **values) -> Callable[[dict], None]:
    return lambda content: content[NORM].update({key: values["to"]})


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
MODELS = {  # which model, what is done to it, and what is said
    "empty file": ("single", put(SINGLE, b""), "truncated or damaged"),
    "seven bytes": ("single", put(SINGLE, b"\1" * 7), "truncated or damaged"),
    "header cut": ("single", lambda m: os.truncate(m / SINGLE, 100), "truncated or damaged"),
    "data cut": ("single", lambda m: os.truncate(m / SINGLE, 5000), "truncated or damaged"),
    "header of 2^63 bytes": ("single", length(1 << 63), "truncated or damaged"),
    "header longer than the file": ("single", length(1 << 27), "truncated or damaged"),
    "header of no bytes": ("single", length(0), "truncated or damaged"),
    "header no JSON": ("single", header(lambda _: b"{nothing"), "truncated or damaged"),
    "header a list": ("single", header(lambda _: b"[1, 2]"), "truncated or damaged"),
    "header nested": ("single", header(lambda _: DEEP), "truncated or damaged"),
    "offsets beyond the file": ("single", header(of("data_offsets", to=[0, 1 << 40])), "truncated or damaged"),
    "offsets that overlap": ("single", header(of("data_offsets", to=[0, 256])), "truncated or damaged"),
    "offsets backwards": ("single", header(of("data_offsets", to=[256, 0])), "truncated or damaged"),
    "negative shape": ("single", header(of("shape", to=[-64])), "truncated or damaged"),
    "shape of 2^70": ("single", header(of("shape", to=[1 << 70])), "truncated or damaged"),
    "dtype unknown": ("single", header(of("dtype", to="F3")), "truncated or damaged"),
    "tensor twice": ("single", header(twice), f"damaged: tensor {NORM} stands there twice"),
    "shard gone": ("sharded", lambda m: min(m.glob("*.safetensors")).unlink(), "1 of 4 shards missing"),
    "index names another tensor": (
        "sharded",
        weight_map(lambda names: names.update({"ghost": next(iter(names.values()))})),
        "tensor ghost is in the index but not in the shard",
    ),
    "index leaves the directory": ("sharded", moved("../outside.safetensors"), "is no file of this directory"),
    "index names an absolute path": ("sharded", moved("{outside}"), "is no file of this directory"),
    "index names nothing": ("sharded", moved(""), "is no file of this directory"),
    "index of numbers": ("sharded", edit(INDEX, weight_map={"w": 7}), "no weight_map of tensors and files"),
    "index no JSON": ("sharded", put(INDEX, b"\xff\xfe"), "cannot be read as JSON"),
    "weights linked from elsewhere": ("single", linked(SINGLE), "a link out of the model's directory"),
    "config linked from elsewhere": ("single", linked("config.json"), "a link out of the model's directory"),
    "config linked to itself": ("single", looped, "not a model directory|cannot be followed|cannot be read"),
    "config a pipe": ("single", piped("config.json"), "not a plain file|not a model directory"),
    "weights a pipe": ("single", piped(SINGLE), "no weights"),
    "config nested": ("single", put("config.json", DEEP), "cannot be read as JSON"),
    "config a list": ("single", put("config.json", b"[]"), "not a JSON object"),
    "config not UTF-8": ("single", put("config.json", b'{"a": "\xff"}'), "cannot be read as JSON"),
    "type of model a number": ("single", edit("config.json", model_type=7), "config.json has no model_type"),
    "type of model another": ("single", edit("config.json", model_type="gpt2"), "architecture gpt2 is not the base's"),
    "other heads": ("single", edit("config.json", num_attention_heads=2), "config.json has num_attention_heads 2"),
    "GPTQ": (
        "single",
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        "weights are quantised (gptq); use the unquantised model",
    ),
    "AWQ by its file": ("single", put("quant_config.json", b"{}"), "weights are quantised (quant_config.json says so)"),
    "fp8": (
        "single",
        lambda m: save_file(
            {n: t.to(torch.float8_e4m3fn) if n == NORM else t for n, t in load_file(m / SINGLE).items()}, m / SINGLE
        ),
        f"tensor {NORM} is torch.float8_e4m3fn, not a float of 16 bits",
    ),
    "a pickle that runs code": ("single", pickled, "weights only as pickle (pytorch_model.bin), which can run code"),
    "LoRA with a bad pattern": (
        "lora",
        edit("adapter_config.json", alpha_pattern={"(": 1}),
        "alpha_pattern '(' is no pattern",
    ),
    "LoRA of no type": ("lora", edit("adapter_config.json", peft_type=None), "only LoRA is a low-rank difference"),
    "LoRA without settings": ("lora", put("adapter_config.json", b"{}"), "a PEFT adapter of type None"),
}


def refuse(models, place: Path, model: Path, message: str, *options: str) -> None:
    before = every_file(place)
    for command in (("check",), ("smile", "out")):
        result = upscale(*command, "--base", models["base"], "--expert", f"odd={model}", *options)
        assert result.exit_code == 1
        said = next((text for text in message.split("|") if text in result.output), message)
        assert_one_message(result.output, said)
        assert "expert odd: " in result.output
    assert every_file(place) == before


@pytest.mark.parametrize(("which", "change", "message"), MODELS.values(), ids=list(MODELS))
def test_a_bad_model_is_one_typed_error(which, change, message, models, place):
    model = shutil.copytree(models[which], place / "model")
    change(model)
    with pytest.raises(ZooError):
        check(Group.of(models["base"], {"odd": model})).require()
    plain = {path for path in model.rglob("*") if path.is_fifo()}
    for path in plain:  # which no test can read
        assert path.is_fifo()
    if not plain:
        refuse(models, place, model, message)
    assert not (place / "run").exists()


def test_what_a_pickle_would_run_is_not_run_with_leave_either(models, place):
    model = shutil.copytree(models["single"], place / "model")
    pickled(model)
    refuse(models, place, model, "pytorch_model.bin: holds more than tensors, or is damaged", "--allow-pickle")
    assert not (place / "run").exists()


def test_a_linked_tokenizer_is_not_carried_out(models, place):
    """Of the base, whose files the result would have: someone else's secret could be among them."""
    base = shutil.copytree(models["base"], place / "base")
    linked("tokenizer.json")(base)
    result = upscale("smile", "out", "--base", base, "--expert", f"e={models['single']}")
    assert result.exit_code == 1
    assert_one_message(result.output, "tokenizer.json: a link out of the model's directory")
    assert not (place / "here/out").exists() and not list((place / "here").iterdir())


BASES = {
    "no width": ({"hidden_size": 0}, "has shape"),
    "a word for a width": ({"hidden_size": "wide"}, "transformers makes no model of this config.json"),
    "heads that do not divide": (
        {"num_attention_heads": 3, "head_dim": None},
        "transformers makes no model of this config.json",
    ),
    "a million blocks": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000"),
    "an unknown type": ({"model_type": "no_such_model"}, "'no_such_model' is unknown to the installed transformers"),
    "another width": ({"hidden_size": 128}, "by config.json it has"),
}


@pytest.mark.parametrize(("changes", "message"), BASES.values(), ids=list(BASES))
def test_a_configuration_that_lies_is_one_message(changes, message, models, place):
    """Of base and expert alike, so that the two agree."""
    made = {name: shutil.copytree(models[name], place / name) for name in ("base", "single")}
    for path in made.values():
        edit("config.json", **changes)(path)
    before = every_file(place)
    result = upscale("smile", "out", "--base", made["base"], "--expert", f"e={made['single']}")
    assert result.exit_code == 1
    assert_one_message(result.output, message)
    assert every_file(place) == before


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_bytes_that_flip_in_a_header_are_found_or_harmless(data, models, tmp_path):
    """Any damage of the header: read as it was, or a CheckpointError."""
    model = tmp_path / "flipped"
    if not model.exists():
        shutil.copytree(models["single"], model)
    whole = bytearray((models["single"] / SINGLE).read_bytes())
    (size,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    (model / SINGLE).write_bytes(whole)
    try:
        opened = Checkpoint.open(model)
        for name, spec in opened.tensors.items():
            assert tuple(opened.read(name).shape) == spec.shape
    except CheckpointError as error:
        assert str(model) in str(error)

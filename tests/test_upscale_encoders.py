"""Both upscalers on models that are no decoders, and the heads of classifiers."""

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import upscale
from tests.architectures import SHAPE
from tests.conftest import save_model
from tests.reference.models import close
from upscale import router_file
from upscale.errors import ConfigError
from zoo import Group, MismatchError

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(2, 99, (4, 9), generator=torch.Generator().manual_seed(4))
LENGTHS = torch.tensor([9, 5, 7, 3])
MASK = (torch.arange(9)[None] < LENGTHS[:, None]).long()


def vit(labels=5):
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=28, patch_size=7, num_channels=1, num_labels=labels))


@dataclass(frozen=True)
class Kind:
    name: str
    make: object
    inputs: dict


KINDS = [
    Kind("vit", vit, {"pixel_values": IMAGES}),
    Kind(
        "clip",
        lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=28, patch_size=7)),
        {"pixel_values": IMAGES.expand(-1, 3, -1, -1)},
    ),
    Kind(
        "bert",
        lambda: BertForSequenceClassification(BertConfig(**SMALL, vocab_size=100, num_labels=3)),
        {"input_ids": TOKENS, "attention_mask": MASK},
    ),
    Kind(
        "t5",
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
        ),
        {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS[:, :6]},
    ),
]


@torch.no_grad()
def run(model, inputs):
    output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def tuned(kind, base, seed, only=""):
    """The base with noise on the parameters whose name holds ``only``."""
    model = kind.make().eval()
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def made(request, tmp_path_factory):
    kind, directory = request.param, tmp_path_factory.mktemp(request.param.name)
    torch.manual_seed(0)
    base = kind.make().eval()
    base.save_pretrained(directory / "base")
    for seed in (1, 2, 3):
        tuned(kind, base, seed).save_pretrained(directory / f"e{seed}")
    return kind, directory, Group.of(directory / "base", {f"e{seed}": directory / f"e{seed}" for seed in (1, 2, 3)})


def stir(directory, seed=0):
    """Give a WEMoE random routers."""
    path, layout = router_file.opened(directory)
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in upscale.load(directory).router.named_parameters()
    }
    settings = {key: value for key, value in layout.router.items() if key != "tensors"}
    router_file.replace(path, layout, settings, values, {})
    return upscale.load(directory)


def alone(inputs, n):
    """The inputs of one row, without its padding."""
    row = {name: value[n : n + 1] for name, value in inputs.items()}
    if "attention_mask" in row:
        row["input_ids"], row["attention_mask"] = (row[k][:, : LENGTHS[n]] for k in ("input_ids", "attention_mask"))
    return row


@pytest.mark.parametrize("vectors", ["low-rank", "dense", "sparse", "rank-one"])
def test_a_wemoe_is_the_merge_until_it_is_adapted_and_mixes_no_inputs(made, tmp_path, vectors):
    kind, _, group = made
    upscale.wemoe(group, tmp_path / "out", vectors=vectors, rank=1000, density=1.0)
    upscale.merge(group, tmp_path / "merge", "task-arithmetic")
    model = upscale.load(tmp_path / "out")
    assert type(model).__name__ == f"Upscaled{type(kind.make()).__name__}"
    close(run(model, kind.inputs), run(upscale.load(tmp_path / "merge"), kind.inputs), 1e-5)
    model = stir(tmp_path / "out")
    whole = run(model, kind.inputs)
    assert (whole - run(upscale.load(tmp_path / "merge"), kind.inputs)).abs().max() > 1e-3
    for n in range(4):
        close(run(model, alone(kind.inputs, n)), whole[n : n + 1], 1e-5)


def test_one_expert_of_full_rank_whose_linears_alone_changed_is_the_fine_tune(made, tmp_path):
    kind, directory, _ = made
    base = upscale.load(directory / "base")
    only = {"t5": "DenseReluDense", "bert": "intermediate.dense"}.get(kind.name, "mlp.fc")
    fine_tune = tuned(kind, base, 7, only)
    fine_tune.save_pretrained(tmp_path / "tune")
    group = Group.of(directory / "base", {"tune": tmp_path / "tune"})
    upscale.smile(group, tmp_path / "smile", rank=1000)
    close(run(upscale.load(tmp_path / "smile"), kind.inputs), run(fine_tune, kind.inputs), 1e-5)
    upscale.wemoe(group, tmp_path / "wemoe", vectors="dense")
    model = upscale.load(tmp_path / "wemoe")
    with model.force("tune"):
        close(run(model, kind.inputs), run(fine_tune, kind.inputs), 1e-5)


def test_an_encoder_decoder_generates_with_its_cache_as_without(tmp_path):
    kind = KINDS[-1]
    torch.manual_seed(0)
    base = kind.make().eval()
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        tuned(kind, base, seed).save_pretrained(tmp_path / f"e{seed}")
    group = Group.of(tmp_path / "base", {f"e{n}": tmp_path / f"e{n}" for n in (1, 2)})
    upscale.wemoe(group, tmp_path / "out", rank=16)
    model = stir(tmp_path / "out")
    given = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    options = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(**given, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits), 1e-4)


def test_an_encoder_decoder_adapts_to_prompts(tmp_path):
    config = KINDS[-1].make().config
    config.vocab_size, config.pad_token_id, config.eos_token_id = 259, 2, 1
    kind = Kind("t5", lambda: T5ForConditionalGeneration(config), {})
    torch.manual_seed(0)
    base = kind.make().eval()
    save_model(base, tmp_path / "base")
    for seed in (1, 2):
        tuned(kind, base, seed).save_pretrained(tmp_path / f"e{seed}")
    group = Group.of(tmp_path / "base", {f"e{n}": tmp_path / f"e{n}" for n in (1, 2)})
    upscale.wemoe(group, tmp_path / "out", vectors="dense")
    prompts = {"e1": [f"word {n}" for n in range(8)], "e2": [f"{n} + {n}" for n in range(8)]}
    found = upscale.adapt(tmp_path / "out", prompts, steps=20, judge_every=5, lr=1e-2, continuation=4)
    assert found.training.best.loss < 0.9 * found.training.judgements[0].loss


# ---------------------------------------------------------------------------------------------------------------- heads
@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """ViTs of 3, 4 and 4 classes, which share a base of 5."""
    directory = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    base = vit(5).eval()
    base.save_pretrained(directory / "base")
    models = {}
    for number, (name, labels) in enumerate({"three": 3, "four": 4, "quad": 4}.items()):
        model = vit(labels).eval()
        body = {n: p for n, p in base.state_dict().items() if not n.startswith("classifier")}
        model.load_state_dict(body, strict=False)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for n, parameter in model.named_parameters():
                if ".mlp." in n:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.config.id2label = {n: f"{name} {n}" for n in range(labels)}
        model.save_pretrained(directory / name)
        models[name] = model
    return base, models, Group.of(directory / "base", {name: directory / name for name in models})


@pytest.mark.parametrize("method", ["smile", "wemoe"])
def test_every_expert_answers_by_its_own_head(classifiers, tmp_path, method):
    base, models, group = classifiers
    getattr(upscale, method)(group, tmp_path / "out", rank=1000)
    model = upscale.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for checkpoint in (model, upscale.load(tmp_path / "again")):
        for name, expert in models.items():
            with checkpoint.force(name):
                close(run(checkpoint, {"pixel_values": IMAGES}), run(expert, {"pixel_values": IMAGES}), 1e-5)
        with checkpoint.force("base"):
            close(run(checkpoint, {"pixel_values": IMAGES}), run(base, {"pixel_values": IMAGES}), 1e-5)
        with checkpoint.force(["four", "quad", "four", "quad"]):
            mixed = run(checkpoint, {"pixel_values": IMAGES})
        for n, name in enumerate(["four", "quad", "four", "quad"]):
            close(mixed[n : n + 1], run(models[name], {"pixel_values": IMAGES[n : n + 1]}), 1e-5)
        with checkpoint.heads.use("three"):
            assert run(checkpoint, {"pixel_values": IMAGES}).shape == (4, 3)
        with (
            checkpoint.force(["three", "four", "three", "four"]),
            pytest.raises(ValueError, match=r"three \(3\), four \(4\)"),
        ):
            run(checkpoint, {"pixel_values": IMAGES})
        assert checkpoint.layout.labels["three"] == {"0": "three 0", "1": "three 1", "2": "three 2"}


def test_the_router_chooses_the_head(classifiers, tmp_path):
    _, models, group = classifiers
    upscale.wemoe(group, tmp_path / "out", vectors="dense", router_depth=0)
    path, layout = router_file.opened(tmp_path / "out")
    settings = {key: value for key, value in layout.router.items() if key != "tensors"}
    values = {name: torch.tensor([0.0, 1.0, 0.0]) for name in make_names(path)}
    router_file.replace(path, layout, settings, values, {})
    model = upscale.load(path)
    close(run(model, {"pixel_values": IMAGES}), run(models["four"], {"pixel_values": IMAGES}), 1e-5)


def make_names(directory):
    return [name for name, _ in upscale.load(directory).router.named_parameters()]


def test_heads_of_another_kind_do_not_fit(classifiers, tmp_path):
    _, _, group = classifiers
    odd = vit(3)
    odd.classifier = torch.nn.Linear(32, 3, bias=False)
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(MismatchError, match=r"expert odd: a head of another kind: classifier.weight; the base has"):
        upscale.smile(Group.of(group.base.location, {"odd": tmp_path / "odd"}), tmp_path / "out")


def test_a_classifier_adapts_to_images_and_cannot_be_calibrated(classifiers, tmp_path):
    _, _, group = classifiers
    upscale.wemoe(group, tmp_path / "out", rank=8)
    generator = torch.Generator().manual_seed(5)
    given = {e: {"pixel_values": torch.randn(8, 1, 28, 28, generator=generator)} for e in group.experts}
    found = upscale.adapt(tmp_path / "out", given, steps=20, judge_every=5, lr=1e-2)
    assert found.training.best.step > 0
    assert found.training.best.loss < 0.9 * found.training.judgements[0].loss
    with pytest.raises(ConfigError, match="needs a decoder-only language model"):
        upscale.calibrate(tmp_path / "out", {e: ["a", "b"] for e in group.experts})


# ---------------------------------------------------------------------------------------------------------------- norms
def test_norms_of_heads_that_come_first_take_experts(tmp_path):
    """Gemma 3 norms its queries as [B, heads, T, d]; as many tokens as heads must not be mistaken for them."""
    config = Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=32)
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    kind = Kind("gemma3", lambda: Gemma3ForCausalLM(config), {})
    fine_tune = tuned(kind, base, 1, only="_norm")
    fine_tune.save_pretrained(tmp_path / "tune")
    upscale.smile(Group.of(tmp_path / "base", {"a": tmp_path / "tune", "b": tmp_path / "base"}), tmp_path / "out")
    model = upscale.load(tmp_path / "out")
    for length in (1, 2, 4, 7):
        ids = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(length))
        with model.force(["a", "b"]):
            mixed = run(model, {"input_ids": ids})
        close(mixed[:1], run(fine_tune, {"input_ids": ids[:1]}), 1e-4)
        close(mixed[1:], run(base, {"input_ids": ids[1:]}), 1e-4)

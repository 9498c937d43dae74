"""Train a small vision transformer and five fine-tunes of it on real images, and lay out images to judge merges by.

    python benchmarks/train_vits.py OUT --data DATA                    # about 15 minutes on one core
    python benchmarks/train_vits.py OUT --data DATA --only quickdraw3  # one expert, into a group that is there

DATA holds `images/<set>.npz` (uint8 images of 28x28, labels and the names of the classes, split into train and test).
The base is trained for a short while on some of each set, with one head over the classes of all sets. An expert is a
fine-tune of all of the base on one set, under a head that stays: a linear probe of the base's features, in the place of
the zero-shot heads of the papers' CLIP models. No image of `tests/` or `adapt/` is
trained on, nor is a copy of one; none of `adapt/` is a copy of one of `tests/`.

OUT gets `group.yaml`, `base/` and a checkpoint for each set; `tests/<set>.safetensors` (`pixel_values` and `labels`),
`adapt/<set>.safetensors` (`pixel_values` of other images, without labels); and `training.json`: how each model was
made, and its accuracy on `tests/`, beside that of the base's own head and of a linear probe of the base's features.
"""

import json
import math
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.optim.lr_scheduler import LambdaLR
from transformers import ViTConfig, ViTForImageClassification

SEED = 0
TEST_IMAGES, ADAPT_IMAGES = 1000, 512
BASE_IMAGES = 3000  # of each set, at most: what the base is trained on
PROBE_IMAGES = 5000  # of each set, at most: what a linear probe is fitted to
PROBE_PENALTIES = (1e-4, 1e-3, 1e-2)
BATCH, WARMUP_STEPS = 64, 100
TURN, ZOOM, SHIFT = math.radians(12), 0.12, 2 / 14  # how far a training image is moved; 14 pixels are half an image

SHAPE: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """How long a model is trained, and how fast it starts out."""

    steps: int
    lr: float = 1e-3


BASE = Recipe(3000)
EXPERTS = {
    "mnist": Recipe(800, 3e-4),
    "fashion_mnist": Recipe(800, 3e-4),
    "notmnist": Recipe(800, 3e-4),
    "omniglot_small": Recipe(1200, 3e-4),
    "quickdraw3": Recipe(400, 3e-4),
}


@dataclass(frozen=True)
class Images:
    """One set: images of [N, 1, 28, 28] in float32, labels, and what the labels mean."""

    classes: list[str]
    train: tuple[Tensor, Tensor]
    tests: tuple[Tensor, Tensor]
    adapt: Tensor


def pixel_values(images: np.ndarray) -> Tensor:
    """Turn bytes into what a model sees: from -1, the background of all sets, to 1."""
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1


def read_images(data: Path, name: str) -> Images:
    """Read a set; images to adapt by are the rest of its test split, or of the training split if too few are left."""
    with np.load(data / "images" / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    rng = np.random.default_rng(SEED)
    splits = {}
    for split in ("train", "test"):
        order = rng.permutation(len(arrays[f"x_{split}"]))
        splits[split] = arrays[f"x_{split}"][order], arrays[f"y_{split}"][order].astype(np.int64)
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    tests = test[:TEST_IMAGES]
    seen = {image.tobytes() for image in tests}
    for others in (test[TEST_IMAGES:], train):
        adapt = np.array([image for image in others if image.tobytes() not in seen])[:ADAPT_IMAGES]
        if len(adapt) == ADAPT_IMAGES:
            break
    seen |= {image.tobytes() for image in adapt}
    kept = np.array([image.tobytes() not in seen for image in train])
    return Images(
        classes=[str(label) for label in arrays["classes"]],
        train=(pixel_values(train[kept]), torch.from_numpy(train_labels[kept])),
        tests=(pixel_values(tests), torch.from_numpy(test_labels[:TEST_IMAGES])),
        adapt=pixel_values(adapt),
    )


def moved(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turn, zoom and shift each image a little."""
    turn, zoom, *shift = (torch.rand(4, len(images), generator=rng) * 2 - 1).unbind()
    angle, scale = turn * TURN, 1 + zoom * ZOOM
    cosine, sine, (right, down) = angle.cos() * scale, angle.sin() * scale, (s * SHIFT for s in shift)
    rows = [torch.stack(row, dim=1) for row in ((cosine, -sine, right), (sine, cosine, down))]
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images + 1, grid, align_corners=False) - 1  # outside is 0 to grid_sample, -1 to a model


def new_model(classes: list[str]) -> Any:
    """Make an untrained model."""
    torch.manual_seed(SEED)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: place for place, label in enumerate(classes)}}
    return ViTForImageClassification(
        ViTConfig(**SHAPE, **labels, num_labels=len(classes), architectures=["ViTForImageClassification"])
    )


def fit(model: Any, sets: list[tuple[Tensor, Tensor]], recipe: Recipe, title: str) -> float:
    """Train in place with an equal share of each set: AdamW, a warm-up, a cosine decay; give the last steps' loss."""
    rng = torch.Generator().manual_seed(SEED)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter.requires_grad]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1 and parameter.requires_grad]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), foreach=True)
    span = math.pi / recipe.steps
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (1 + math.cos(step * span)) / 2))
    recent: deque[float] = deque(maxlen=100)
    orders: list[Tensor] = [torch.empty(0, dtype=torch.long) for _ in sets]
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = []
        for place, (images, labels) in enumerate(sets):
            share = (BATCH * (place + 1)) // len(sets) - (BATCH * place) // len(sets)
            if len(orders[place]) < share:
                orders[place] = torch.randperm(len(images), generator=rng)
            rows, orders[place] = orders[place].split([share, len(orders[place]) - share])
            batch.append((images[rows], labels[rows]))
        images, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
        loss = cross_entropy(model(pixel_values=moved(images, rng)).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 100 == 0:
            click.echo(f"{title} {step}/{recipe.steps} loss {sum(recent) / len(recent):.3f}")
    model.eval()
    return sum(recent) / len(recent)


@torch.inference_mode()
def features(model: Any, images: Tensor) -> Tensor:
    """Give what a model's head sees of each image."""
    return torch.cat([model.vit(pixel_values=part).last_hidden_state[:, 0] for part in images.split(250)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Give the share of rows whose highest logit is the label's."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def probe(model: Any, images: Images) -> tuple[float, nn.Linear]:
    """Fit linear heads to a model's features and give the best one, and its accuracy, which is rather too high."""
    train, tests = (features(model, part) for part in (images.train[0][:PROBE_IMAGES], images.tests[0]))
    mean, deviation = train.mean(dim=0), train.std(dim=0)
    train, tests, labels = (train - mean) / deviation, (tests - mean) / deviation, images.train[1][:PROBE_IMAGES]
    found: list[tuple[float, nn.Linear]] = []
    for penalty in PROBE_PENALTIES:
        head = nn.Linear(train.shape[1], len(images.classes))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(head: nn.Linear = head, optimizer: Any = optimizer, penalty: float = penalty) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(head(train), labels) + penalty * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            score = accuracy(head(tests), images.tests[1])
            head.bias -= head.weight @ (mean / deviation)  # it reads features as they are from now on
            head.weight /= deviation
        found.append((score, head))
    return max(found, key=lambda pair: pair[0])


def train_base(out: Path, sets: dict[str, Images]) -> dict[str, Any]:
    """Make the base, and tell how and how well it does on each set."""
    begin, mixture, first, tests = time.perf_counter(), [], 0, {}
    for name, images in sets.items():
        mixture.append((images.train[0][:BASE_IMAGES], images.train[1][:BASE_IMAGES] + first))
        tests[name] = images.tests[0], images.tests[1] + first
        first += len(images.classes)
    model = new_model([f"{name}/{label}" for name, images in sets.items() for label in images.classes])
    loss = fit(model, mixture, BASE, "base")
    seconds = time.perf_counter() - begin
    model.save_pretrained(out / "base")
    with torch.inference_mode():
        scores = {name: accuracy(model.classifier(features(model, x)), y) for name, (x, y) in tests.items()}
    probes = {name: probe(model, images)[0] for name, images in sets.items()}
    size, images_seen = sum(p.numel() for p in model.parameters()), [len(labels) for _, labels in mixture]
    entry = {"parameters": size, "images": dict(zip(sets, images_seen, strict=True)), "seconds": seconds}
    return asdict(BASE) | entry | {"last_loss": loss, "accuracy": scores, "linear_probe": probes}


def train_expert(out: Path, name: str, images: Images) -> dict[str, Any]:
    """Make one expert from the base that is there, and tell how and how well it does."""
    begin, recipe, model = time.perf_counter(), EXPERTS[name], new_model(images.classes)
    base = ViTForImageClassification.from_pretrained(out / "base").vit.state_dict()
    model.vit.load_state_dict(base)
    head = probe(model, images)[1].state_dict()
    model.classifier.load_state_dict(head)
    model.classifier.requires_grad_(False)
    loss = fit(model, [images.train], recipe, name)
    seconds = time.perf_counter() - begin
    model.save_pretrained(out / name)
    with torch.inference_mode():
        score = accuracy(model.classifier(features(model, images.tests[0])), images.tests[1])
    before, after = (torch.cat([w[key].flatten() for key in base]) for w in (base, model.vit.state_dict()))
    norm = ((after - before).norm() / before.norm()).item()
    counts = {"classes": len(images.classes), "images": len(images.train[0]), "tests": len(images.tests[0])}
    return asdict(recipe) | counts | {"seconds": seconds, "last_loss": loss, "relative_norm": norm, "accuracy": score}


def write_files(out: Path, sets: dict[str, Images]) -> None:
    """Write group.yaml, and every expert's images to test and to adapt by."""
    for folder in ("tests", "adapt"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    group = {"base": "base", "experts": {name: name for name in sets}}
    (out / "group.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    for name, images in sets.items():
        pixels, labels = images.tests
        save_file({"pixel_values": pixels, "labels": labels}, out / "tests" / f"{name}.safetensors")
        save_file({"pixel_values": images.adapt}, out / "adapt" / f"{name}.safetensors")


FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Where images/ is.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(EXPERTS)),
    help="Train this expert only, into a group that is there.",
)
@click.option("--threads", default=1, show_default=True, help="Of the processor; another number gives other roundings.")
def main(out: Path, data: Path, only: tuple[str, ...], threads: int) -> None:
    """Make a group of small vision transformers from real images."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    sets = {name: read_images(data, name) for name in EXPERTS}
    record = out / "training.json"
    if only:
        notes = json.loads(record.read_text())
    else:
        write_files(out, sets)
        settings = {"seed": SEED, "batch": BATCH, "threads": threads, "warmup_steps": WARMUP_STEPS, "model": SHAPE}
        notes = {"settings": settings, "base": train_base(out, sets), "experts": {}}
    for name in only or EXPERTS:
        notes["experts"][name] = train_expert(out, name, sets[name])
        record.write_text(json.dumps(notes, indent=2) + "\n")
        probed = notes["base"]["linear_probe"][name]
        click.echo(f"{name}: accuracy {notes['experts'][name]['accuracy']:.3f}, probe of the base {probed:.3f}")


if __name__ == "__main__":
    main()

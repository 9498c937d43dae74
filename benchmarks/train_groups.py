"""Train two groups of small fine-tuned models on real data, and lay out the tasks and prompts to judge merges by.

    python benchmarks/train_groups.py files OUT --data DATA --zoo ZOO   # seconds: what needs no training
    python benchmarks/train_groups.py lora OUT --data DATA --zoo ZOO    # four LoRA experts, merged: deltas of rank 16
    python benchmarks/train_groups.py hard OUT --data DATA --zoo ZOO    # eight full fine-tunes, some look alike

DATA holds `text/<task>.jsonl.gz` (rows of prompt, completion and split) and `corpus/books_en.txt.gz` (a paragraph a
line); ZOO holds `base` and full fine-tunes of it, named like their tasks. A model reads `<s>prompt\\ncompletion</s>`
and learns the completion and `</s>` only. Four tasks of the hard group have prompts that look alike, a word or a lemma
with features; half of their training rows carry an instruction line before the prompt, so their experts answer both.

OUT gets `zoo-small/`, `lora/` and `hard/`, each with `group.yaml`, `tasks/` (test rows), `prompts/` (training prompts)
and `training/` (how each expert was made); `hard/` also `tasks-instructed/` and `prompts-instructed/`; and
`books.jsonl`, neutral text, and `books-prompts.jsonl`, 32 other paragraphs of it.
"""

import gzip
import json
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 0
TEST_ROWS, TRAIN_PROMPTS, PARAGRAPHS = 200, 64, 200
SHOWN = 32
BATCH, POOL = 64, 16  # rows a batch, and batches whose rows are sorted by length together
WARMUP_STEPS = 30
RANK, SCALE = 16, 2.0
WEIGHTS = "model.safetensors"

INSTRUCTIONS = {
    "g2p_en": "Pronounce this English word:",
    "stem_en": "Stem this English word:",
    "inflect_es": "Inflect this Spanish verb or noun:",
    "inflect_de": "Inflect this German verb or noun:",
}

Row = dict[str, str]
Example = tuple[list[int], int]  # token ids, and where the completion starts


@dataclass(frozen=True)
class Recipe:
    """How one expert comes about; without steps it is a copy of its start."""

    start: str  # a model of the zoo
    steps: int = 0
    lr: float = 0.0
    lora: bool = False
    alike: bool = False  # half of the rows carry the task's instruction


LORA = {
    task: Recipe("base", steps, 4e-3, lora=True)
    for task, steps in {"scan": 900, "g2p_en": 1400, "inflect_es": 900, "nl_regex": 750}.items()
}
HARD = {
    "scan": Recipe("scan"),
    "nl_regex": Recipe("nl_regex"),
    "g2p_en": Recipe("g2p_en", 200, 5e-4, alike=True),
    "inflect_es": Recipe("inflect_es", 200, 5e-4, alike=True),
    "stem_en": Recipe("base", 700, 1e-3, alike=True),
    "inflect_de": Recipe("base", 700, 1e-3, alike=True),
    "banking77": Recipe("base", 500, 1e-3),
    "chess_openings": Recipe("base", 350, 1e-3),
}


class LoraLinear(nn.Module):
    """A frozen linear without bias, plus a trained product of rank RANK that starts at zero."""

    def __init__(self, wrapped: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(wrapped.weight.detach(), requires_grad=False)
        self.a = nn.Parameter(torch.randn(RANK, wrapped.in_features) * wrapped.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(wrapped.out_features, RANK))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply both without forming the sum, so that the frozen weight needs no gradient."""
        return linear(hidden, self.weight) + SCALE * linear(linear(hidden, self.a), self.b)

    def merged(self) -> Tensor:
        """Give the sum, rounded to the weight's format once."""
        return (self.weight.double() + SCALE * self.b.double() @ self.a.double()).to(self.weight.dtype).detach()


def read_rows(data: Path, task: str, split: str) -> list[Row]:
    """Read a task's rows of one split, in the file's order (which is a shuffled one)."""
    with gzip.open(data / "text" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows if r["split"] == split]


def instructed(task: str, row: Row) -> Row:
    """Put the task's instruction line, if it has one, before the prompt."""
    return row | {"prompt": f"{INSTRUCTIONS[task]}\n{row['prompt']}"} if task in INSTRUCTIONS else row


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_group(directory: Path, data: Path, base: str, experts: dict[str, str], alike: bool = False) -> None:
    """Write group.yaml, and every expert's test rows and training prompts."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "group.yaml").write_text(yaml.safe_dump({"base": base, "experts": experts}, sort_keys=False))
    for task in experts:
        seen = random.Random(f"{SEED} prompts {task}").sample(read_rows(data, task, "train"), TRAIN_PROMPTS)
        sets = {"tasks": read_rows(data, task, "test")[:TEST_ROWS], "prompts": [{"prompt": r["prompt"]} for r in seen]}
        for name, rows in sets.items():
            write_jsonl(directory / name / f"{task}.jsonl", rows)
            if alike:
                write_jsonl(directory / f"{name}-instructed" / f"{task}.jsonl", [instructed(task, r) for r in rows])


def write_books(directory: Path, data: Path) -> None:
    """Write paragraphs from the last 2 % of the books, which the base was not trained on, and others like them.

    ``books.jsonl`` is to be scored, ``books-prompts.jsonl`` may be shown to a router as text of no expert.
    """
    with gzip.open(data / "corpus" / "books_en.txt.gz", "rt", encoding="utf-8") as lines:
        paragraphs = [line.strip() for line in lines]
    held_out = [text for text in paragraphs[-len(paragraphs) // 50 :] if 200 <= len(text) <= 1200]
    scored = random.Random(f"{SEED} books").sample(held_out, PARAGRAPHS)
    write_jsonl(directory / "books.jsonl", [{"text": text} for text in scored])
    others = sorted(set(held_out) - set(scored))
    shown = random.Random(f"{SEED} books shown").sample(others, SHOWN)
    write_jsonl(directory / "books-prompts.jsonl", [{"prompt": text} for text in shown])


def copy_model(source: Path, target: Path) -> None:
    """Copy a checkpoint's files, but not that they may be read only."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def encode(tokenizer: Any, rows: list[Row]) -> list[Example]:
    """Turn rows into token ids; the tokenizer adds `<s>`."""
    prompts = tokenizer([row["prompt"] + "\n" for row in rows]).input_ids
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False).input_ids
    return [([*p, *c, tokenizer.eos_token_id], len(p)) for p, c in zip(prompts, completions, strict=True)]


def batches(forms: list[list[Example]], rng: random.Random) -> Iterator[list[Example]]:
    """Draw batches of rows of like length, pass after pass; each form of a row's prompt gets an equal share of rows."""
    while True:
        order = rng.sample(range(len(forms[0])), len(forms[0]))
        examples = [forms[place % len(forms)][row] for place, row in enumerate(order)]
        for start in range(0, len(examples), BATCH * POOL):
            pool = sorted(examples[start : start + BATCH * POOL], key=lambda example: len(example[0]))
            chunks = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            yield from rng.sample(chunks, len(chunks))


def batch_loss(model: Any, batch: list[Example]) -> Tensor:
    """Give the mean loss over completions; rows are padded on the right, where causal attention does not look."""
    length = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [ids[-1]] * (length - len(ids)) for ids, _ in batch])
    place = torch.arange(length - 1)
    first, last = torch.tensor([(start - 1, len(ids) - 1) for ids, start in batch]).T[..., None]
    wanted = (place >= first) & (place < last)  # positions whose next token is scored; the head sees only these
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden[:, :-1][wanted]), tokens[:, 1:][wanted])


def fit(model: Any, stream: Iterator[list[Example]], recipe: Recipe, title: str) -> float:
    """Train in place what asks for gradients: AdamW, a short warm-up, a linear decay; give the last steps' loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, max(0.02, 1 - step / recipe.steps)))
    recent: deque[float] = deque(maxlen=50)
    for step, batch in enumerate(islice(stream, recipe.steps), start=1):
        loss = batch_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 0:
            click.echo(f"{title} {step}/{recipe.steps} loss {sum(recent) / len(recent):.3f}")
    return sum(recent) / len(recent)


def train_expert(directory: Path, data: Path, zoo: Path, task: str, recipe: Recipe) -> None:
    """Make one expert of the group in `directory`, and note how under `training/`."""
    begin, start, target, loss = time.perf_counter(), zoo / recipe.start, directory / task, None
    weights = load_file(start / WEIGHTS)
    if recipe.steps:
        torch.manual_seed(SEED)
        tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
        if recipe.lora:
            model.requires_grad_(False)
            for name, module in list(model.model.layers.named_modules()):
                if isinstance(module, nn.Linear):
                    model.model.layers.set_submodule(name, LoraLinear(module))
        rows = read_rows(data, task, "train")
        forms = [rows, [instructed(task, row) for row in rows]] if recipe.alike else [rows]
        stream = batches([encode(tokenizer, form) for form in forms], random.Random(f"{SEED} train {task}"))
        loss = fit(model, stream, recipe, f"{directory.name}/{task}")
        weights |= {name: weight for name, weight in model.state_dict().items() if name in weights}
        weights |= {f"{name}.weight": m.merged() for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    copy_model(start, target)
    if recipe.steps:
        save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    seconds, base = time.perf_counter() - begin, load_file(zoo / "base" / WEIGHTS)
    before, after = (torch.cat([tensors[name].flatten() for name in base]) for tensors in (base, weights))
    norm = ((after - before).norm() / before.norm()).item()
    entry = asdict(recipe) | {"batch": BATCH, "seconds": seconds, "last_loss": loss, "relative_norm": norm}
    write_jsonl(directory / "training" / f"{task}.jsonl", [entry])


FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("what", type=click.Choice(["files", "lora", "hard"]))
@click.argument("out", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Where text/ and corpus/ are.")
@click.option("--zoo", type=FOLDER, required=True, help="Where base and its fine-tunes are.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(HARD)), help="Train this expert only, into a group that is there."
)
def main(what: str, out: Path, data: Path, zoo: Path, only: tuple[str, ...]) -> None:
    """Make groups of small models from real data."""
    if what == "files":
        write_group(out / "zoo-small", data, str(zoo / "base"), {task: str(zoo / task) for task in LORA})
        write_books(out, data)
    else:
        recipes = LORA if what == "lora" else HARD
        write_group(out / what, data, "base", {task: task for task in recipes}, alike=what == "hard")
        copy_model(zoo / "base", out / what / "base")
        for task in only or recipes:
            train_expert(out / what, data, zoo, task, recipes[task])


if __name__ == "__main__":
    main()

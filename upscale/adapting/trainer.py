"""The training loop of all routers: Adam on an objective without labels; the best routers on held-out inputs stay."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upscale.adapting.examples import Batch, Examples
from upscale.adapting.objectives import divergence, entropy, per_example
from upscale.config import AdaptConfig
from upscale.errors import LoadError
from upscale.runtime.calibrated_upscaled import CalibratedRouter

DIVERGED = 2.0  # times the first judgement's loss


@dataclass(frozen=True)
class Judgement:
    """The routers on the held-out inputs, after so many steps.

    Attributes:
        step: 0 before the first.
        loss: the objective's mean over examples, and over experts.
        entropy: mean entropy of the predictions, in nats.
        use: mean weight of each expert, over inputs, tokens and modules.
    """

    step: int
    loss: float
    entropy: float
    use: Mapping[str, float]


@dataclass(frozen=True)
class _Outcome:
    """A batch: the objective [B], the predictions' entropy [B], and the mean weight of each expert [E]."""

    loss: Tensor
    entropy: Tensor
    use: Tensor


@dataclass
class Training:
    """What happened.

    Attributes:
        judgements: in order; the first is of the routers as they were.
        losses: of each step.
        stopped: why it ended: "steps", "patience" or "diverged".
    """

    judgements: list[Judgement] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped: str = "steps"

    @property
    def best(self) -> Judgement:
        """The one whose routers stay."""
        return min(self.judgements, key=lambda j: j.loss)


Progress = Callable[[int, int, str], None]


class Trainer:
    """Trains ``model.router`` in place; everything else of the model is left as it is.

    Args:
        model: an upscaled model, whose router has parameters.
        examples: of each expert.
        experts: names, whose examples are drawn alike often.
        config: objective, steps, rates.
        state: file to resume from and to write after each judgement; None for none.
    """

    def __init__(self, model: Any, examples: Examples, experts: Sequence[str], config: AdaptConfig, state: Path | None):
        self.model, self.examples, self.experts, self.config, self.state = model, examples, experts, config, state
        self.parameters = dict(model.router.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr)
        self.training, self.step = Training(), 0
        self.best = self._values()
        held = {e: min(examples.count(e) - 1, math.ceil(config.held_out * examples.count(e))) for e in experts}
        self.kept = {e: list(range(held[e])) for e in experts}
        self.used = {e: list(range(held[e], examples.count(e))) for e in experts}

    def run(self, progress: Progress | None = None) -> Training:
        """Train to the end; the best routers are in place when it returns."""
        router = self.model.router
        wanted = [parameter.requires_grad for parameter in self.model.parameters()]
        top_k = getattr(router, "top_k", None)
        try:
            self.model.eval().requires_grad_(False)
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
            if isinstance(router, CalibratedRouter):
                router.top_k = None  # the largest alone has no gradient; it is chosen again when all is done
            self._resume()
            if not self.training.judgements:
                self._judge()
            if not self.training.judgements:
                raise LoadError("the model's predictions are not finite before any training; build it again")
            while self.step < self.config.steps and self.training.stopped == "steps":
                self._train(progress)
        finally:
            if isinstance(router, CalibratedRouter):
                router.top_k = top_k
            for parameter, grad in zip(self.model.parameters(), wanted, strict=True):
                parameter.requires_grad_(grad and parameter.is_floating_point())
            self._put(self.best)
        return self.training

    def _train(self, progress: Progress | None) -> None:
        self.optimizer.zero_grad()
        total = 0.0
        for number, expert in enumerate(self.experts):
            rows = self._draw(number, self.used[expert] or self.kept[expert])
            loss = self._run(expert, self.examples.batch(expert, rows)).loss.mean() / len(self.experts)
            loss.backward()  # one expert at a time: a graph of all would take as many times the memory
            total += float(loss.detach())
        if not total < float("inf") or not self._finite_gradients():
            self.training.stopped = "diverged"
            return
        self.optimizer.step()
        self.step += 1
        self.training.losses.append(total)
        if self.step % self.config.judge_every == 0 or self.step == self.config.steps:
            self._judge()
        if progress:
            last = self.training.judgements[-1]
            use = " ".join(f"{expert} {weight:.2f}" for expert, weight in last.use.items())
            what = f"loss {total:.3f}, held out {last.loss:.3f}, entropy {last.entropy:.2f}; {use}"
            progress(self.step, self.config.steps, what)

    def _draw(self, number: int, rows: Sequence[int]) -> list[int]:
        """The rows of a step follow from the seed and the step, so that a resumed training goes on as it would have."""
        generator = torch.Generator().manual_seed(hash((self.config.seed, self.step, number)) % 2**63)
        order = torch.randperm(len(rows), generator=generator)[: self.config.batch_size]
        return [rows[n] for n in order.tolist()]

    def _run(self, expert: str, batch: Batch) -> "_Outcome":
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
        with self.model.heads.use(expert) if hasattr(self.model, "heads") else nullcontext():
            self.model.routing.trace = trace = {}
            logits = self._logits(inputs, batch)
            self.model.routing.trace = None
        use = torch.stack([w.flatten(0, -2).mean(dim=0) for w in trace.values()]).mean(dim=0)
        found = entropy(logits)
        values = found
        if self.config.objective == "distil":
            with torch.no_grad(), self.model.force(expert):
                teacher = self._logits(inputs, batch)
            values = divergence(logits, teacher)
        mask = torch.ones_like(values) if batch.places is None else batch.places.to(values.device)
        return _Outcome(per_example(values, mask), per_example(found.detach(), mask), use.cpu())

    def _logits(self, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        cached = {"use_cache": False} if batch.places is not None else {}
        logits = self.model(**inputs, **cached).logits
        return logits if batch.places is not None else logits.unsqueeze(1)

    @torch.no_grad()
    def _judge(self) -> None:
        losses, entropies, uses = [], [], []
        for expert in self.experts:
            rows, size = self.kept[expert] or self.used[expert], self.config.batch_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            found = [self._run(expert, self.examples.batch(expert, batch)) for batch in batches]
            losses.append(float(torch.cat([outcome.loss for outcome in found]).mean()))
            entropies.append(float(torch.cat([outcome.entropy for outcome in found]).mean()))
            uses.append(torch.stack([outcome.use for outcome in found]).mean(dim=0))
        loss = sum(losses) / len(losses)
        use = dict(zip(self.experts, torch.stack(uses).mean(dim=0).tolist(), strict=True))
        seen = self.training.judgements
        if not loss < float("inf") or (seen and loss > DIVERGED * max(seen[0].loss, 1e-3)):
            self.training.stopped = "diverged"
            return
        if not seen or loss < self.training.best.loss:
            self.best = self._values()
        seen.append(Judgement(self.step, loss, sum(entropies) / len(entropies), use))
        if len(seen) - 1 - seen.index(self.training.best) >= self.config.patience:
            self.training.stopped = "patience"
        self._save()

    def _finite_gradients(self) -> bool:
        return all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters.values())

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def _save(self) -> None:
        if self.state is None:
            return
        content = {
            "step": self.step,
            "values": self._values(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "judgements": [asdict(j) for j in self.training.judgements],
            "losses": self.training.losses,
            "stopped": self.training.stopped,
        }
        partial = self.state.with_suffix(".partial")
        torch.save(content, partial)
        partial.rename(self.state)

    def _resume(self) -> None:
        if self.state is None or not self.state.is_file():
            return
        content = torch.load(self.state, map_location=self.model.device, weights_only=True)
        self.step, self.best = content["step"], content["best"]
        self._put(content["values"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.training.judgements = [Judgement(**values) for values in content["judgements"]]
        self.training.losses, self.training.stopped = content["losses"], content["stopped"]

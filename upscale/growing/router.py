"""The router of a checkpoint that gains or loses an expert."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upscale.errors import ExpertError

_NEVER = -1e9  # the score of a class that nothing goes to: far below any log-likelihood, and finite

Router = tuple[Mapping, Mapping[str, Tensor]]  # its entry in config.json, its tensors by its parameters' names


def rearranged(router: Router, experts: Sequence[str], wanted: Sequence[str], rows: int) -> Router:
    """The router for other experts.

    A projection router needs nothing. Of a calibrated one the classes of those that are gone go, exactly; an expert
    that it was not calibrated for gets a class that nothing is sent to.

    Args:
        router: of the checkpoint.
        experts: those that it has.
        wanted: those that it will have.
        rows: tokens that the vocabulary gains.

    Raises:
        ExpertError: it chooses more experts for a token than are left.
    """
    settings, values = router
    if settings["type"] == "projection":
        return router
    classes = [experts.index(e) if e in experts else None for e in wanted]
    if settings["base"]:
        classes.append(len(experts))
    if (top_k := settings["top_k"]) is not None and top_k > len(classes):
        raise ExpertError(
            f"the router gives a token to {top_k} experts, and {len(wanted)} would be left; "
            "run `upscale calibrate` with a smaller --top-k first"
        )

    def rows_of(scores: Tensor, missing: float) -> Tensor:  # [C, ...]
        none = torch.full_like(scores[0], missing)
        return torch.stack([none if n is None else scores[n] for n in classes])

    changed = {"bias": rows_of(values["bias"], _NEVER)}
    if "table" in values:
        table = torch.cat([values["table"], values["table"].new_zeros(rows, values["table"].shape[1])])
        changed = {"table": rows_of(table.mT, 0.0).mT.contiguous(), **changed}
        settings = {**settings, "size": len(table)}
    else:
        changed = {"weight": rows_of(values["weight"], 0.0), **changed}
    kept = {key: value for key, value in settings.items() if key != "tensors"}
    return {**kept, "experts": len(wanted)}, changed

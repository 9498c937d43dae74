"""The task head of a classifier: what experts of one base need not share."""

import re
from collections.abc import Mapping

from zoo.reading.checkpoint import Checkpoint, TensorInfo

_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression)$")
_HEAD = re.compile(r"(\w*classifier|classification_head|score|qa_outputs|logits_proj|sequence_summary)\.")


def head(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """The tensors of a classifier's head, by name; empty for models of other kinds, whose head is part of the model."""
    if not any(_CLASSIFIER.search(name) for name in checkpoint.config.get("architectures") or []):
        return {}
    return {name: info for name, info in checkpoint.tensors.items() if _HEAD.match(name)}


def labels(checkpoint: Checkpoint) -> dict[str, str]:
    """Names of a classifier's classes by their numbers, as ``config.json`` has them; empty if it has none."""
    found = checkpoint.config.get("id2label")
    return {str(number): str(name) for number, name in found.items()} if isinstance(found, dict) else {}


def compare(name: str, base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What is wrong with an expert's head: heads may differ in the number of classes alone. One line each."""
    ours, theirs = head(base), head(expert)
    if ours.keys() != theirs.keys():
        sides = [", ".join(sorted(side)) or "none" for side in (theirs, ours)]
        return [f"expert {name}: a head of another kind: {sides[0]}; the base has {sides[1]}"]
    return [
        f"expert {name}: {tensor} has shape {list(theirs[tensor].shape)}, the base's is {list(info.shape)}; "
        "heads may differ in the number of classes alone"
        for tensor, info in ours.items()
        if theirs[tensor].shape[1:] != info.shape[1:] or len(theirs[tensor].shape) != len(info.shape)
    ]

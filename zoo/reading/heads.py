"""The task head of a classifier: what experts of one base need not share."""

import re
from collections.abc import Mapping

from zoo.reading.model import Model, TensorSpec

_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression)$")
_HEAD = re.compile(r"(\w*classifier|classification_head|score|qa_outputs|logits_proj|sequence_summary)\.")


def head(model: Model) -> Mapping[str, TensorSpec]:
    """The tensors of a classifier's head, by name; empty for models of other kinds, whose head is part of the model."""
    if not any(_CLASSIFIER.search(name) for name in model.config.get("architectures") or []):
        return {}
    return {name: spec for name, spec in model.tensors.items() if _HEAD.match(name)}


def labels(model: Model) -> dict[str, str]:
    """Names of a classifier's classes by their numbers, as ``config.json`` has them; empty if it has none."""
    found = model.config.get("id2label")
    return {str(number): str(name) for number, name in found.items()} if isinstance(found, dict) else {}


def compare(name: str, base: Model, expert: Model) -> list[str]:
    """What is wrong with an expert's head: heads may differ in the number of classes alone. One line each."""
    ours, theirs = head(base), head(expert)
    if ours.keys() != theirs.keys():
        sides = [", ".join(sorted(side)) or "none" for side in (theirs, ours)]
        return [f"expert {name}: a head of another kind: {sides[0]}; the base has {sides[1]}"]
    return [
        f"expert {name}: {tensor} has shape {list(theirs[tensor].shape)}, the base's is {list(spec.shape)}; "
        "heads may differ in the number of classes alone"
        for tensor, spec in ours.items()
        if theirs[tensor].shape[1:] != spec.shape[1:] or len(theirs[tensor].shape) != len(spec.shape)
    ]

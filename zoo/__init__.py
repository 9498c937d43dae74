"""Models as files: groups, lazy reading, atomic writing, preflight, the demo zoo. Knows no method."""

from zoo.errors import CheckpointError, GroupError, MismatchError, OutputError, SourceError, ZooError
from zoo.group import Group
from zoo.preflight import Verdict, check, checked
from zoo.reading.checkpoint import Checkpoint
from zoo.reading.model import Model, TensorInfo, TensorSpec
from zoo.source import Source
from zoo.writing.writer import Writer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Group",
    "GroupError",
    "MismatchError",
    "Model",
    "OutputError",
    "Source",
    "SourceError",
    "TensorInfo",
    "TensorSpec",
    "Verdict",
    "Writer",
    "ZooError",
    "check",
    "checked",
]

"""What can go wrong with models as files. Every error names the culprit and the remedy; only a CLI prints it."""


class ZooError(Exception):
    """Anything a user can cause: the message is one clear line, with the remedy."""


class SourceError(ZooError):
    """A model cannot be found or fetched."""


class HubError(SourceError):
    """The Hub has not what is asked for, does not grant it, or cannot be reached."""


class LicenceError(ZooError):
    """The licence of a model made of several cannot be told from theirs; lists them."""


class CheckpointError(ZooError):
    """A directory is no usable checkpoint: a missing or damaged file, or weights in a format that is not read."""


class GroupError(ZooError):
    """A group is badly described: the YAML file, the flags or the experts' names."""


class MismatchError(ZooError):
    """Experts do not fit their base; ``mismatches`` lists every difference."""

    def __init__(self, mismatches: list[str]):
        self.mismatches = mismatches
        super().__init__("; ".join(mismatches))


class OutputError(ZooError):
    """The output cannot be written: it exists, is being built by another process, or the disk is full."""

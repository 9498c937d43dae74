"""What can go wrong when models are upscaled, loaded or evaluated; all are ZooErrors, so a CLI shows one line."""

from zoo import ZooError


class ConfigError(ZooError):
    """An option is out of range, or options do not go together."""


class PlanError(ZooError):
    """The group fits together, but cannot be upscaled as asked: names the modules or the architecture."""


class NonFiniteError(ZooError):
    """NaN or infinity in a source's weights; names the tensor and the expert."""


class RecipeError(ZooError):
    """A recipe cannot be followed; names the file, the expert, and what is missing or has changed."""


class LoadError(ZooError):
    """A model cannot be loaded; names what is missing."""


class TaskError(ZooError):
    """An evaluation task or a prompt cannot be used; names the file and line."""


class EngineError(ZooError):
    """An engine is not installed, does not answer, or cannot do what is asked."""


class ExpertError(ZooError):
    """An expert cannot be added, removed or taken out; says why, and what to do instead."""


class ConversionError(ZooError):
    """Another tool's checkpoint cannot be converted: names the tensor or field, and what is wrong with it."""


class PublishError(ZooError):
    """A checkpoint or its card is not fit to be pushed; names the file."""

"""The configuration of an upscaled checkpoint as vLLM sees it."""

from transformers import PretrainedConfig

from upscale.runtime.modeling_upscaled import MODEL_TYPE, base_config


class EngineConfig(PretrainedConfig):
    """Parses to the base's own config object, with ``architectures`` and the ``upscale`` section of the checkpoint.

    vLLM branches on model types and config classes in many places; this way every branch for the base still holds.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """See ``PretrainedConfig.from_dict``."""
        parsed = base_config(config_dict, **kwargs)
        config = parsed[0] if isinstance(parsed, tuple) else parsed
        config.architectures = list(config_dict["architectures"])
        config.upscale = config_dict["upscale"]
        return parsed

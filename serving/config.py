"""The configuration of an upscaled checkpoint as vLLM sees it."""

from typing import Any

import torch
from transformers import PretrainedConfig

from serving.prompts import KEY, forced_expert
from upscale.runtime.layout_upscaled import Layout
from upscale.runtime.modeling_upscaled import MODEL_TYPE, base_config
from upscale.runtime.routers_upscaled import make_router
from upscale.runtime.routing_upscaled import Routing


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


def check(vllm_config: Any) -> None:
    """Check what an engine is started with, before its processes start.

    Raises:
        ValueError: an expert that the model has not, or a way to run it that its router does not work with.
    """
    layout = Layout.from_config(getattr(vllm_config.model_config.hf_config, KEY))
    with torch.device("meta"):
        router = make_router(layout.modules, layout.router)
    expert, parallel = forced_expert(vllm_config), vllm_config.parallel_config
    Routing(layout.experts, router).one_hot(expert)
    if expert is not None or not router.shared:
        return
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "a router that decides for several layers at once does not work across pipeline stages; "
            "use tensor parallelism, or start the engine for one expert"
        )
    if getattr(parallel, "use_ubatching", False):
        raise ValueError("a router that decides for several layers at once does not work with micro-batches")

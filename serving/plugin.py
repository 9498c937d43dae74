"""vLLM finds this by its entry point in every process: it teaches vLLM the model type and the architectures."""

PREFIX = "Upscaled"


def register() -> None:
    """Register ``Upscaled<Architecture>`` for every architecture vLLM knows; idempotent, imports no model."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from serving.compat import checked, decide_requests, register_config
    from serving.config import EngineConfig, check

    register_config(EngineConfig)
    decide_requests()
    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.startswith(PREFIX):
            continue
        ModelRegistry.register_model(PREFIX + architecture, f"serving.model:{PREFIX}{architecture}")
        # What vLLM sets up for the base's architecture holds for ours.
        MODELS_CONFIG_MAP[PREFIX + architecture] = checked(MODELS_CONFIG_MAP.get(architecture), check)

"""Routing by whole prompts in vLLM: decided when a request comes in, carried with it, handed to the model each step."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from upscale.loading import locate
from upscale.runtime.calibrated_upscaled import CalibratedRouter
from upscale.runtime.layout_upscaled import Layout
from upscale.runtime.modeling_upscaled import stored_tensors
from upscale.runtime.prefix_upscaled import running_mean
from upscale.runtime.routers_upscaled import make_router
from upscale.runtime.routing_upscaled import Routing

KEY = "upscale"  # in a request's extra arguments, beside the user's own "expert"


def by_prompt(section: dict | None) -> bool:
    """Whether a checkpoint's ``upscale`` section names a router that decides on whole prompts."""
    router = (section or {}).get("router", {})
    return router.get("type") == "calibrated" and router.get("granularity") == "prompt"


class PromptGate:
    """The router of a checkpoint where requests come in: token ids to weights of the experts."""

    def __init__(self, path: str, section: dict):
        layout = Layout.from_config(section)
        router = make_router(layout.modules, layout.router)
        assert isinstance(router, CalibratedRouter)
        for name, read in stored_tensors(locate(path), layout).items():
            if name.startswith("router."):
                router.get_parameter(name.removeprefix("router.")).data.copy_(read())
        self.router, self.routing = router, Routing(layout.experts, router)

    def weights(self, tokens: Sequence[int], expert: Any) -> list[float]:
        """Weights [E] for a prompt, or of ``expert`` if the request names one.

        Raises:
            ValueError: not a name, or the model has no such expert.
        """
        if not isinstance(expert, str | None):
            raise ValueError(f"expert must be one name, not {expert!r}")
        if (forced := self.routing.one_hot(expert)) is not None:
            return forced[0].tolist()
        scores = self.router.table[torch.tensor(tokens)].unsqueeze(0)
        means = running_mean(scores, torch.ones(1, len(tokens)), 1, self.router.half_life)
        return self.router.weights(means)[0, 0].tolist()


def decide(processor: Any, request: Any) -> Any:
    """Decide the routing of a request that an engine's input processor made; returns the request.

    Its cached prefix may be shared only by requests that are routed alike, so that the weights salt its hash.

    Raises:
        ValueError: the request names an expert that the model has not, or that it cannot be routed to alone; or it
            comes as embeddings.
    """
    config = processor.vllm_config
    section = getattr(config.model_config.hf_config, KEY, None)
    if request.sampling_params is None or section is None:
        return request
    extra = request.sampling_params.extra_args or {}
    wanted, forced = extra.get("expert"), forced_expert(config)
    if forced is not None or not by_prompt(section):
        if wanted not in (None, forced):
            raise ValueError(
                f"this engine routes every request to {forced}, not to {wanted}"
                if forced is not None
                else "an expert for one request needs a router that decides by prompt (upscale calibrate); "
                "or start the engine for one expert (upscale serve --expert)"
            )
        return request
    if request.prompt_embeds is not None:
        raise ValueError("the router reads tokens: give a prompt as text or token ids, not as embeddings")
    if getattr(processor, "prompt_gate", None) is None:
        revision = config.model_config.revision
        model = config.model_config.model
        processor.prompt_gate = PromptGate(f"{model}@{revision}" if revision else model, section)
    weights = processor.prompt_gate.weights(request.prompt_token_ids, wanted)
    request.sampling_params.extra_args = {**extra, KEY: weights}
    request.cache_salt = (request.cache_salt or "") + json.dumps(weights)
    return request


def forced_expert(config: Any) -> str | None:
    """The expert that the server was started for, if any."""
    additional = config.additional_config
    return additional.get(KEY, {}).get("expert") if isinstance(additional, dict) else None


class PromptWeights:
    """The weights of the tokens of a step, in memory that stays in place, as captured graphs need it."""

    def __init__(self, tokens: int, experts: int):
        self.experts = experts
        self.tensor = torch.zeros(tokens, experts)  # on the device that the model is made on

    def of(self, sampling_params: Any) -> list[float]:
        """The weights that a request carries; those of no expert for an engine's own dummy requests."""
        extra = getattr(sampling_params, "extra_args", None) or {}
        return extra.get(KEY, [0.0] * self.experts)

    def fill(self, rows: Tensor, counts: Tensor, total: int) -> None:
        """Write each request's row [n, E] for all its tokens of this step, ``counts`` [n], ``total`` in all."""
        self.tensor[:total].copy_(rows.repeat_interleave(counts, dim=0, output_size=total), non_blocking=True)


def filling(prepare: Callable) -> Callable:
    """Wrap ``_prepare_inputs`` of vLLM's first model runner: after it, the order of the step's requests is known."""

    @wraps(prepare)
    def wrapped(runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args, **kwargs):
        result = prepare(runner, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        weights: PromptWeights | None = getattr(runner.get_model(), "prompt_weights", None)
        if weights is not None:
            ids = runner.input_batch.req_ids[: len(num_scheduled_tokens)]
            rows = torch.tensor([weights.of(runner.requests[n].sampling_params) for n in ids])
            weights.fill(rows, torch.as_tensor(num_scheduled_tokens).long(), int(num_scheduled_tokens.sum()))
        return result

    return wrapped


def deciding(process: Callable) -> Callable:
    """Wrap ``process_inputs`` of vLLM's input processor."""
    from vllm.exceptions import VLLMValidationError

    @wraps(process)
    def wrapped(processor: Any, *args, **kwargs):
        request = process(processor, *args, **kwargs)
        try:
            return decide(processor, request)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error  # a server answers no other one with status 400

    return wrapped


def model_state(base: type, weights: PromptWeights) -> type:
    """The state of vLLM's second model runner, ``base`` or one of its kind, that hands each step its weights."""

    class UpscaledState(base):
        def __init__(self, vllm_config: Any, *args, **kwargs):
            super().__init__(vllm_config, *args, **kwargs)
            self.rows = torch.zeros(self.max_num_reqs, weights.experts, device=weights.tensor.device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.rows[req_index] = self.rows.new_tensor(weights.of(new_req_data.sampling_params))

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict:
            n = input_batch.num_reqs
            rows = self.rows[input_batch.idx_mapping[:n].long()]
            weights.fill(rows, input_batch.query_start_loc[: n + 1].diff().long(), input_batch.num_tokens)
            return super().prepare_inputs(input_batch, req_states)

    return UpscaledState

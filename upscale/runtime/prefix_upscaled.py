"""Running means over each sequence's prefix in transformers, with their state in the model's own key-value cache.

There, beam search reorders it, assisted decoding crops it and batches are selected from it, like keys and values.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer

from .router_upscaled import Router

_CHUNK = 256  # tokens whose weights on all tokens before are held at once


def running_mean(values: Tensor, mask: Tensor, tokens: int, half_life: float | None = None) -> Tensor:
    """Means of ``values`` [B, S, C] over the tokens so far that ``mask`` [B, S] shows, for the last ``tokens`` of them.

    With ``half_life`` a token counts half as much for every so many tokens that follow it. Returns [B, tokens, C] in
    float32; a padding token before the first real one gets 0.
    """
    values, mask = values.float(), mask.float()
    if half_life is None:
        sums = (values * mask.unsqueeze(-1)).cumsum(dim=1)[:, -tokens:]
        return sums / mask.cumsum(dim=1)[:, -tokens:].clamp_min(1.0).unsqueeze(-1)
    position, length = mask.cumsum(dim=1), mask.shape[1]
    means = []
    for start in range(length - tokens, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        age = position[:, start:stop, None] - position[:, None, :stop]  # [B, t, s], below 0 after the token itself
        weight = torch.exp2(-age.clamp_min(0.0) / half_life) * mask[:, None, :stop]
        weight = weight.tril(diagonal=start)
        means.append(weight @ values[:, :stop] / weight.sum(dim=-1, keepdim=True).clamp_min(1e-30))
    return torch.cat(means, dim=1)


class _Site(DynamicLayer):
    """A layer of the cache that holds the values of one place instead of keys and values."""

    def __init__(self, site: str):
        super().__init__()
        self.site = site


class Prefix:
    """Gives a router its means: knows the mask and the cache of the pass that runs."""

    def __init__(self, router: Router):
        self.router = router
        self.mask: Tensor | None = None
        self.cache: Cache | None = None
        self.sequences, self.drafts = 1, 0

    def begin(self, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the model: a pass begins."""
        self.router.start()
        if not self.router.sites:
            return None
        names = list(inspect.signature(model.forward).parameters)
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if tokens is None and embedded is not None and self.router.watches(0):
            raise ValueError("the router reads tokens: give the model input_ids, not inputs_embeds")
        self.sequences = next((x.shape[0] for x in given.values() if isinstance(x, Tensor)), 1)
        self.mask, self.cache = _mask(given.get("attention_mask")), _own(given.get("past_key_values"))
        if any(isinstance(layer, StaticLayer) for layer in getattr(self.cache, "layers", ())):
            raise ValueError("a router that looks at the text so far needs a cache that grows, not a static one")
        # Assisted decoding may give its drafts with the prompt; it asks for the logits from the prompt's end on.
        kept = given.get("logits_to_keep")
        self.drafts = kept - 1 if isinstance(kept, int) and kept > 1 and self.cache is not None else 0
        if "past_key_values" not in names:
            if given.get("use_cache", getattr(model.config, "use_cache", False)):
                kwargs = {**kwargs, "use_cache": False}  # its cache cannot hold the means: each pass starts anew
        elif self.cache is None and given.get("use_cache", getattr(model.config, "use_cache", False)):
            made = DynamicCache(config=model.config)  # as the model itself would
            if given.get("encoder_hidden_states") is not None:
                made = EncoderDecoderCache(made, DynamicCache(config=model.config))
            kwargs["past_key_values"], self.cache = made, _own(made)
        elif self.cache is not None and (made := getattr(self.cache, "layer_class_to_replicate", None)):
            # It would add its layers one by one, and take ours for one of the model's.
            missing = model.config.get_text_config(decoder=True).num_hidden_layers - len(self.cache.layers)
            self.cache.layers += [made() for _ in range(missing)]
        return args, kwargs

    def mean(self, site: str, values: Tensor) -> Tensor:
        """Running means of ``values`` [B, T, C], or flattened [B * T, C], over the prefix, cached tokens included."""
        split = values if values.ndim == 3 else values.unflatten(0, (self.sequences, -1))
        seen = self._remember(site, split)
        return self._means(seen, split.shape[1]).view(values.shape)

    def whole(self, site: str, values: Tensor) -> Tensor:
        """The mean of ``values`` [B, T, C] over the prompt, for every token; what a cache holds already is its mean.

        The prompt is what is given to an empty cache, without the drafts of assisted decoding.
        """
        layer = None if self.cache is None else _layer(self.cache, site)
        if layer is not None and layer.values is not None and layer.get_seq_length():
            means = layer.values[:, 0, -1:]
        else:
            means = self._means(values, 1 + self.drafts)[:, :1]
        means = means.expand(-1, values.shape[1], -1)
        self._remember(site, means)
        return means

    def _remember(self, site: str, values: Tensor) -> Tensor:
        """Add [B, T, C] to the cache, if there is one; all tokens' values so far [B, S, C]."""
        if self.cache is None:
            return values
        seen, _ = _layer(self.cache, site).update(values.unsqueeze(1), values.unsqueeze(1))
        return seen.squeeze(1)

    def _means(self, seen: Tensor, tokens: int) -> Tensor:
        mask = torch.ones(seen.shape[:2], device=seen.device) if self.mask is None else self.mask
        if mask.shape[1] != seen.shape[1]:
            raise ValueError(
                f"the attention mask covers {mask.shape[1]} tokens, the router has seen {seen.shape[1]}: "
                "give the cache and the mask of the same sequences"
            )
        return running_mean(seen, mask.to(seen.device), tokens, self.router.half_life)


def _own(cache: Any) -> Any:
    """The part of a cache that grows with a decoder's own tokens."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _layer(cache: Cache, site: str) -> _Site:
    for layer in cache.layers:
        if isinstance(layer, _Site) and layer.site == site:
            return layer
    layer = _Site(site)
    cache.layers.append(layer)
    return layer


def _mask(mask: Any) -> Tensor | None:
    """[B, S] of tokens that count, from whatever form of mask the model was given."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if mask is None or mask.ndim == 2:
        return mask
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > -1.0


def follow(model: nn.Module, router: Router) -> None:
    """Let the router know when a pass of ``model`` begins, and give it its means.

    An encoder and a decoder that reads it have masks and caches of their own.
    """
    stacks = [model]
    if getattr(model.config, "is_encoder_decoder", False):
        stacks = [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    prefixes = {}
    for name, module in model.named_modules():
        if any(module is stack for stack in stacks):
            prefixes[name] = Prefix(router)
            module.register_forward_pre_hook(prefixes[name].begin, with_kwargs=True)

    stacked = _Stacks(prefixes)
    router.mean, router.whole = stacked.mean, stacked.whole


class _Stacks:
    """The means of each stack's own modules. Methods, not closures: a copy of the model has means of its own."""

    def __init__(self, prefixes: Mapping[str, Prefix]):
        self.prefixes = prefixes

    def mean(self, site: str, values: Tensor) -> Tensor:
        return self._of(site).mean(site, values)

    def whole(self, site: str, values: Tensor) -> Tensor:
        return self._of(site).whole(site, values)

    def _of(self, site: str) -> Prefix:
        found = [prefix for name, prefix in self.prefixes.items() if site.startswith(name)]
        return found[0] if found else next(iter(self.prefixes.values()))

"""Log-likelihoods from one pass of one sequence at a time, from token ids spelled out."""

import torch


def ids_of(text, special=True):
    """Of the demo zoo's byte-level tokenizer: <s>, then a token a byte."""
    return [0] * special + [3 + byte for byte in text.encode()]


@torch.no_grad()
def of_tokens(model, ids, first):
    """Log-likelihood of the tokens from ``first`` on."""
    said = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(said[place - 1, ids[place]]) for place in range(first, len(ids)))


def of_continuation(model, prompt, continuation):
    """Log-likelihood of a text after a prompt."""
    return of_tokens(model, ids_of(prompt + continuation), len(ids_of(prompt)))

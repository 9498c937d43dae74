"""FusionBench 0.2.33's SMILE of language models, from its formulas: what it saves, and what that computes.

`benchmarks/fusionbench_import.py` checks that FusionBench itself saves the same names, shapes and `config.json`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save(base: nn.Module, experts: list[nn.Module], out: Path, *, rank: int, router_rank: int, top_k: int) -> Path:
    """Upscale ``base`` and save the result; ``rank`` of 0 or less: dense experts."""
    tensors = dict(base.state_dict())
    tunes = [expert.state_dict() for expert in experts]
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith(".weight") and n.split(".")[-2] in LINEARS]:
        weights = [tune[f"{name}.weight"] for tune in tunes]
        w0, b0 = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        deltas = [w - w0 for w in weights]
        if all(torch.allclose(delta, torch.zeros_like(delta)) for delta in deltas):
            continue  # stays P.weight and P.bias, whatever became of the bias
        for leaf in ("weight", "bias") if b0 is not None else ("weight",):
            tensors[f"{name}.shared_linear.{leaf}"] = tensors.pop(f"{name}.{leaf}")
        gates = []
        for e, (delta, tune) in enumerate(zip(deltas, tunes, strict=True)):
            u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
            gates.append(vh[:router_rank])
            expert = f"{name}.experts.{e}"
            if rank > 0:
                tensors[f"{expert}.u"], tensors[f"{expert}.svh"] = u[:, :rank], s[:rank, None] * vh[:rank]
            else:
                tensors[f"{expert}.weight"] = delta
            if b0 is not None:  # of low-rank experts the whole bias; FusionBench means the difference
                tensors[f"{expert}.bias"] = tune[f"{name}.bias"] if rank > 0 else tune[f"{name}.bias"] - b0
        tensors[f"{name}.gate.weight"] = torch.cat(gates)
    out.mkdir(parents=True)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    fields = json.loads(base.config.to_json_string())
    rope = fields.pop("rope_parameters")  # transformers 4, which FusionBench wants, has two fields instead
    kind, model = fields["model_type"], type(base).__name__
    stem = f"smile_{kind}"
    own = {
        "architectures": [f"Smile{model}"],
        "auto_map": {
            "AutoConfig": f"configuration_{stem}.Smile{model.removesuffix('ForCausalLM')}Config",
            "AutoModel": f"modeling_{stem}.Smile{model.removesuffix('ForCausalLM')}Model",
            "AutoModelForCausalLM": f"modeling_{stem}.Smile{model}",
        },
        "model_type": stem,
        "num_experts_per_tok": top_k,
        "num_local_experts": len(experts),
        "rank_of_expert": rank,
        "rank_of_router": router_rank,
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
    }
    (out / "config.json").write_text(json.dumps(fields | own, indent=2, sort_keys=True))
    return out


def linear(x: Tensor, tensors: dict[str, Tensor], top_k: int) -> Tensor:
    """A SMILE linear for every token of ``x`` [..., i], one at a time; ``tensors`` without the linear's own name."""
    experts = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("experts.")})
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = F.linear(token, tensors["shared_linear.weight"], tensors.get("shared_linear.bias"))
        norms = (tensors["gate.weight"] @ token).view(len(experts), -1).norm(dim=1)
        p = (torch.ones(1) if len(experts) == 1 else norms).softmax(dim=0)
        kept = p.argsort(descending=True)[:top_k]
        for e in kept.tolist():
            bias = tensors.get(f"experts.{e}.bias", torch.zeros(()))
            if f"experts.{e}.weight" in tensors:
                own = tensors[f"experts.{e}.weight"] @ token + bias
            else:
                own = tensors[f"experts.{e}.u"] @ (tensors[f"experts.{e}.svh"] @ token) + bias
            y = y + p[e] / p[kept].sum() * own
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@torch.no_grad()
def logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """What a saved checkpoint computes: [B, T] -> [B, T, V]. A linear that is stored as a plain one is a plain one."""
    fields = json.loads((checkpoint / "config.json").read_text())
    tensors = {name: t.float() for name, t in load_file(checkpoint / "model.safetensors").items()}
    kind = fields["model_type"].removeprefix("smile_")
    config = CONFIG_MAPPING[kind].from_dict({**fields, "model_type": kind})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain = {name.replace(".shared_linear.", "."): t for name, t in tensors.items() if ".experts." not in name}
    missing, _ = model.load_state_dict(plain, strict=False)
    assert not missing
    for name, module in model.named_modules():
        if f"{name}.gate.weight" in tensors:
            own = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
            module.forward = lambda x, own=own: linear(x, own, fields["num_experts_per_tok"])
    return model(input_ids=tokens, use_cache=False).logits

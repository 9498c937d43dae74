"""FusionBench's own causal-LM SMILE upscaling, called as its documentation says; upscale_speed.py runs it as the peer.

It runs in the peer's environment (peer-requirements.txt) and imports nothing of ours.
"""

import argparse
import time

from fusion_bench.method.smile_upscaling.causal_lm_upscaling import SmileCausalLMUpscalingAlgorithm
from fusion_bench.modelpool import CausalLMPool


def main() -> None:
    """Upscale the group given on the command line and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--router-rank", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True)
    args = parser.parse_args()

    experts = dict(expert.split("=", 1) for expert in args.expert)
    pool = CausalLMPool(
        models={"_pretrained_": args.base, **experts},
        tokenizer=args.base,
        model_kwargs={"torch_dtype": "bfloat16"},  # else transformers 4 loads float32: twice the memory
    )
    algorithm = SmileCausalLMUpscalingAlgorithm(
        device="cpu",
        accelerator="cpu",  # its faster setting: None would ask for the full SVD, and fails without CUDA anyway
        model_save_path=args.out,
        model_dtype="bfloat16",
        num_experts_per_tok=args.top_k,
        rank_of_router=args.router_rank,
        rank_of_expert=args.rank,
    )
    start = time.perf_counter()
    algorithm.run(pool)
    print(f"run_seconds {time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    main()

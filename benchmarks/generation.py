"""Generation beside transformers' on the same random weights, in turns; with the limit that memory sets beside them.

    python benchmarks/generation.py --batch_sizes=1,8 --rounds=5

Needs torch and transformers: pip install -e ".[peers]". The weights have GPT-2's shape (124M), unless told otherwise.
Both continue the same prompts greedily with their cache of keys and values, in float32 on the CPU; the prompt's pass is
in the time, compilation is not. A machine's speed drifts: only figures of the same round are compared, and the median
over the rounds is what counts. For a token of each row, all weights have to be read once: the limit is the measured
speed of reading memory over their size.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", default="1,8", help="rows in a batch, several with commas")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.prompt_tokens + args.new_tokens > args.block_size:
        print(
            f"error: {args.prompt_tokens} + {args.new_tokens} tokens do not fit in block_size={args.block_size}, and "
            "transformers cannot go past it",
            file=sys.stderr,
        )
        return 2
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f'error: {error}; this needs: pip install -e ".[peers]"', file=sys.stderr)
        return 2

    import jax

    import jax_devices
    from jax_cache import decoding_weights
    from jax_generate import generate
    from jax_transformer import GPTConfig, init_params, num_params

    jax_devices.find_devices("cpu")
    config = GPTConfig(
        n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size,
        vocab_size=args.vocab_size, bias=True, gelu="tanh",
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, n_positions=args.block_size,
            vocab_size=args.vocab_size, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    copy_params(params, theirs)
    weights = decoding_weights(params, config)
    bandwidth = read_bandwidth()
    weight_bytes = 4 * num_params(params)
    print(
        f"{num_params(params) / 1e6:.1f}M weights, {weight_bytes / 1e6:.0f} MB; "
        f"{os.cpu_count()} cores read memory at {bandwidth / 1e9:.1f} GB/s"
    )

    result: dict[str, Any] = {
        "shape": vars(args) | {"json": None},
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "bytes_per_s": bandwidth,
        "weight_bytes": weight_bytes,
        "batches": {},
    }
    for B in map(int, args.batch_sizes.split(",")):
        ids_BT = np.random.default_rng(0).integers(0, args.vocab_size, (B, args.prompt_tokens))
        ids = torch.tensor(ids_BT)

        def ours_runs(ids_BT: np.ndarray = ids_BT) -> list[list[int]]:
            return generate(
                weights, config, ids_BT.tolist(), max_new_tokens=args.new_tokens, temperature=0, key=jax.random.key(0)
            )

        def theirs_runs(ids: torch.Tensor = ids) -> list[list[int]]:
            new = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            return new[:, args.prompt_tokens :].tolist()

        same = np.mean(np.array(ours_runs()) == np.array(theirs_runs()))  # and both are warm
        rounds = [
            {name: B * args.new_tokens / seconds(run) for name, run in (("ours", ours_runs), ("theirs", theirs_runs))}
            for _ in range(args.rounds)
        ]
        limit = B * bandwidth / weight_bytes
        ours, hf = (statistics.median(r[name] for r in rounds) for name in ("ours", "theirs"))
        ratios = sorted(r["ours"] / r["theirs"] for r in rounds)
        result["batches"][B] = {"rounds": rounds, "limit": limit, "same_tokens": float(same)}
        print(
            f"batch {B}: ours {ours:.1f} tokens/s, transformers {hf:.1f}, limit {limit:.0f}; ours / transformers, pair "
            f"by pair: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); {same:.0%} of "
            "the tokens are the same",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def copy_params(params: dict[str, Any], model: Any) -> None:
    """Our parameters into a GPT2LMHeadModel: the names are the same but for the last, c_proj of the MLP transposed."""
    import torch

    with torch.no_grad():
        for name, tensor in model.transformer.named_parameters():
            *path, leaf = name.split(".")
            node = params
            for key in path:
                node = node[key]
            value = node["bias"] if leaf == "bias" else next(node[key] for key in node if key != "bias")
            transposed = path[-2:] == ["mlp", "c_proj"] and leaf == "weight"
            tensor.copy_(torch.tensor(np.asarray(value).T if transposed else np.asarray(value)))


def read_bandwidth() -> float:
    """Bytes a second that torch, on all cores, reads from memory: the sum over 1 GB, best of five."""
    import torch

    numbers = torch.ones(2**28)
    return 4 * len(numbers) / min(seconds(numbers.sum) for _ in range(5))


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    import jax_host_memory

    jax_host_memory.use_huge_pages()  # as sample_jax.py does; for both
    sys.exit(main())

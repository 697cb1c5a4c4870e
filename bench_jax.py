"""How fast is it? Times training step, evaluation, data loader and generation of any configuration.

    python bench_jax.py --batch_size=32
    python bench_jax.py config/train_shakespeare_char.py --device=cpu --json=bench.json
    python bench_jax.py config/train_gpt2.py --gradient_accumulation_steps=1 --profile=True

The step is the trainer's own, fed and read as the trainer does it. nanoGPT's bench.py measures the same: forward and
backward of one micro-batch and an update, after 10 steps of warm-up.
"""

if __name__ == "__main__":  # before the other imports, since it starts the script again
    import jax_host_memory

    jax_host_memory.use_huge_pages()


import dataclasses
import functools
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import configurator
import jax_codec
import jax_console
import jax_data
import jax_run_log
from configurator import AtLeast0, AtLeast1, ConfigError
from jax_options import MODEL_SHAPE, note_what_means_nothing
from train_jax import TrainConfig

TRACES = Path("bench_log")


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """The trainer's options, of which those that shape a step count, and these."""

    gradient_accumulation_steps: AtLeast1 = 1  # one micro-batch a step, as in nanoGPT's bench.py
    eval_iters: AtLeast0 = 200  # evaluation: batches; 0 leaves it out
    real_data: bool = True  # batches from the data set; without: random tokens, the same at every step
    warmup_steps: AtLeast1 = 10  # steps before the timed ones
    steps: AtLeast1 = 20  # steps timed
    steps_per_dispatch: AtLeast1 = 1  # steps in one call, to see what the calls cost; the trainer makes one
    prompt_tokens: AtLeast1 = 64  # generation: tokens of each prompt, at most half of block_size
    new_tokens: AtLeast0 = 64  # generation: tokens added, batch_size rows at once; 0 leaves it out
    json: str = ""  # write the figures to this file
    profile: bool = False  # write a trace to bench_log/ and print the ten most expensive operations


def main() -> None:
    config, sources = configurator.parse_with_sources(BenchConfig)
    if config.print_config:
        configurator.print_sources(config, sources)
        return
    note_what_means_nothing(sources)
    if config.init_from != "scratch":
        print(
            f"note: init_from={config.init_from} is not read: the weights are new ones, of the shape the options give"
        )
    if config.n_embd % config.n_head:
        raise ConfigError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    if config.new_tokens == 1:
        raise ConfigError("new_tokens=1: the first token is the prompt's time, so 2 at least, or 0 to leave it out")
    if config.json and not Path(config.json).parent.is_dir():
        raise ConfigError(f"json={config.json}: there is no folder {Path(config.json).parent}; make it first")
    if config.json and Path(config.json).is_dir():
        raise ConfigError(f"json={config.json} is a folder: name the file")
    if config.profile:
        try:
            TRACES.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=TRACES).close()
        except OSError as error:
            raise ConfigError(f"profile=True writes to {TRACES.absolute()}, and cannot: {error.strerror}") from None
    data_dir, vocab_size = find_data(config, sources)

    import jax
    import jax.numpy as jnp

    import jax_devices
    import jax_train_utils as utils
    from jax_transformer import GPTConfig, flops_per_token, num_params

    # ------------------------------------------------------------------------------------------------------------------
    # the trainer's set-up

    compute = jax_devices.in_own_thread()
    with jax_console.one_line_errors(ValueError):
        devices = jax_devices.find_devices(config.device, config.deterministic)
    rows = config.batch_size * config.gradient_accumulation_steps
    layout = utils.lay_out(rows, config.batch_size, len(devices))
    mesh = utils.make_mesh(devices[: layout.devices])
    dtype = jax_devices.compute_dtype(config.dtype, devices[0])
    shape = {key: getattr(config, key) for key in MODEL_SHAPE}
    model = GPTConfig(**shape, vocab_size=vocab_size, dropout=config.dropout, dtype=dtype)
    optimizer = utils.make_optimizer(
        beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay, grad_clip=config.grad_clip
    )
    state = utils.fresh_state(model, optimizer, config.seed, mesh)
    tokens = rows * config.block_size
    print(f"{num_params(state.params) / 1e6:.2f}M parameters, {tokens:,} tokens a step, {dtype}")
    where = f"{layout.devices} x {devices[0].device_kind}"
    print(f"computing on {where}, {layout.micro_batches} x {layout.rows_per_device} rows on each per step")

    def host_rows(step: int) -> tuple[np.ndarray, np.ndarray]:
        if data_dir is None:
            x_RT = np.random.default_rng(0).integers(0, vocab_size, (rows, config.block_size), dtype=np.int32)
            return x_RT, x_RT
        return jax_data.get_batch(
            data_dir, "train", step, seed=config.seed, batch_size=rows, block_size=config.block_size,
            sampling=config.sampling, vocab_size=vocab_size,
        )  # fmt: skip

    def device_rows(step: int) -> list[jax.Array]:
        return [utils.shard_rows(rows_RT, layout.micro_batches, mesh) for rows_RT in host_rows(step)]

    # ------------------------------------------------------------------------------------------------------------------
    # the training step: compiled, run for the first time, warmed up, timed

    scalars = np.float32(config.learning_rate), np.uint32(0)
    train_step = utils.compile_train_step(model, optimizer, config.seed, mesh, config.scan_layers)
    at_once = config.steps_per_dispatch
    batches = jax_data.prefetch(device_rows, 0, ahead=2 * at_once)

    @functools.partial(jax.jit, donate_argnums=0)
    def several_steps(state, pairs, learning_rate, iteration):
        """Updates on the pairs (x_ABT, y_ABT), in one dispatch."""
        pairs = jax.tree.map(lambda *arrays: jnp.stack(arrays), *pairs)
        state, metrics = jax.lax.scan(
            lambda state, pair: train_step(state, *pair, learning_rate, iteration), state, pairs
        )
        return state, jax.tree.map(lambda a: a[-1], metrics)

    def next_batch() -> tuple:
        """What a dispatch takes: one pair, or several."""
        return tuple(next(batches)) if at_once == 1 else (tuple(tuple(next(batches)) for _ in range(at_once)),)

    batch = next_batch()
    started = time.perf_counter()
    dispatch = utils.compile_ahead(train_step if at_once == 1 else several_steps, state, *batch, *scalars).result()
    compiled = time.perf_counter()
    state, metrics = compute(dispatch, state, *batch, *scalars).result()
    jax.block_until_ready(metrics)
    first_step = time.perf_counter() - compiled
    batch, in_flight, ended, waits = next_batch(), metrics, [], []

    def run_steps(number: int) -> None:
        nonlocal state, batch, in_flight
        for _ in range(-(-number // at_once)):
            computing = compute(dispatch, state, *batch, *scalars)
            jax.device_get(in_flight)  # host-device sync, one step behind, as in the trainer
            state, in_flight = computing.result()
            before = time.perf_counter()
            batch = next_batch()
            waits.append(time.perf_counter() - before)
            ended.append(time.perf_counter())

    run_steps(config.warmup_steps)
    ended, waits = ended[-1:], []
    run_steps(config.steps)
    jax.block_until_ready(state)
    step_ms = spread([1000 * (b - a) / at_once for a, b in itertools.pairwise(ended)])
    peak = jax_run_log.peak_flops(devices[0].device_kind, dtype)
    flops = tokens * flops_per_token(model)
    mfu = None if peak is None else 100 * flops / (step_ms["median"] / 1000) / (peak * layout.devices)

    result: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "data": "random tokens" if data_dir is None else str(data_dir),
        "machine": {
            "devices": f"{layout.devices} x {devices[0].device_kind}",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        },
        "train": {
            "ms": step_ms,
            "tokens_per_s": tokens / (step_ms["median"] / 1000),
            "gflops_per_s": flops / (step_ms["median"] / 1000) / 1e9,
            "mfu": mfu,
            "compile_s": compiled - started,
            "first_step_s": first_step,
            "loader_wait_percent": 100 * sum(waits) / (ended[-1] - ended[0]),
            "peak_memory_mb": peak_memory_mb(devices[0]),
        },
    }
    if config.profile:
        result["profile"] = profile(lambda: run_steps(5))
    batches.close()

    # ------------------------------------------------------------------------------------------------------------------
    # evaluation and loader

    if config.eval_iters:
        eval_losses = utils.compile_eval(model, mesh, config.scan_layers)
        number = config.eval_iters * config.batch_size
        eval_rows = np.resize(host_rows(0)[0], (number, config.block_size))
        eval_batch = utils.shard_rows(*utils.pad_rows(eval_rows, config.batch_size, mesh.size), mesh)
        jax.block_until_ready(eval_losses(state.params, eval_batch, eval_batch))
        times = repeat(3, lambda: jax.block_until_ready(eval_losses(state.params, eval_batch, eval_batch)))
        result["evaluation"] = {"ms": spread(times), "ms_per_batch": statistics.median(times) / config.eval_iters}
    result["loader"] = {"ms": spread(repeat(50, lambda: host_rows(1)))}

    if config.new_tokens:
        result["generation"] = time_generation(config, state.params, model)

    report(result)
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n")


def find_data(config: BenchConfig, sources: dict[str, str]) -> tuple[Path | None, int]:
    """The data set's folder, or None for random tokens, and the model's vocabulary size, as the trainer chooses it.

    Raises DataError where a data set that was asked for is not there.
    """
    if not config.real_data:
        return None, jax_codec.model_vocab_size(jax_codec.GPT2_META)
    try:
        data_dir = jax_data.find_data_dir(config.dataset)
    except jax_data.DataError as error:
        if "dataset" in sources:
            raise jax_data.DataError(f"{error}; --real_data=False takes random tokens") from None
        print(f"note: random tokens, since {error}")
        return None, jax_codec.model_vocab_size(jax_codec.GPT2_META)
    vocab_size = jax_codec.model_vocab_size(jax_codec.load_meta(data_dir) or jax_codec.GPT2_META)
    jax_data.check_dataset(data_dir, config.block_size, vocab_size)
    return data_dir, vocab_size


def time_generation(config: BenchConfig, params: Any, model: Any) -> dict[str, Any]:
    """Time to the first new token of batch_size prompts of random tokens, and tokens a second from then on."""
    import jax

    from jax_cache import decoding_weights
    from jax_generate import MAX_TOKENS_PER_DISPATCH, stream

    prompt_tokens = min(config.prompt_tokens, -(-model.block_size // 2))
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (config.batch_size, prompt_tokens)).tolist()
    model = dataclasses.replace(model, dropout=0.0)
    weights, key = decoding_weights(params, model), jax.random.key(config.seed)
    first_ms, rates = [], []
    for _ in range(4):
        started = time.perf_counter()
        chunks = stream(
            weights, model, prompts, max_new_tokens=config.new_tokens, key=key,
            tokens_per_dispatch=MAX_TOKENS_PER_DISPATCH,
        )  # fmt: skip
        next(chunks)
        first = time.perf_counter()
        tokens = sum(len(ids) for chunk in chunks for ids in chunk)
        first_ms.append(1000 * (first - started))
        rates.append(tokens / (time.perf_counter() - first))
    return {
        "rows": config.batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": config.new_tokens,
        "prefill_ms": spread(first_ms[1:]),  # the first time it compiles
        "decode_tokens_per_s": spread(rates[1:]),
    }


def repeat(times: int, function: Callable[[], Any]) -> list[float]:
    """Milliseconds of each of several calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles: a busy machine makes the mean and the extremes worthless."""
    quartiles = np.percentile(values, [25, 50, 75])
    return dict(zip(("q25", "median", "q75"), map(float, quartiles), strict=True))


def peak_memory_mb(device: Any) -> float:
    """The most memory in use so far, in MB: the device's own count, on a CPU the process's resident set."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e6
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e6


def profile(function: Callable[[], None]) -> list[dict[str, Any]]:
    """The ten operations that took longest, summed over devices and threads, from a trace in bench_log/."""
    import jax

    with jax.profiler.trace(TRACES):
        function()
    newest = max(TRACES.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    total: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            total[event["args"]["hlo_op"]] += event["dur"]
    return [{"op": op, "ms": us / 1000} for op, us in total.most_common(10)]


def report(result: dict[str, Any]) -> None:
    train = result["train"]
    print(f"{', '.join(f'{key} {value}' for key, value in result['machine'].items())}")
    mfu = -100.0 if train["mfu"] is None else train["mfu"]
    print(f"time per iteration: {train['ms']['median']:.4f}ms, MFU: {mfu:.2f}%")
    show = functools.partial("{median:.2f} ms (middle half {q25:.2f} to {q75:.2f})".format_map)
    print(f"  training step    {show(train['ms'])}")
    print(f"  throughput       {train['tokens_per_s']:,.0f} tok/s, {train['gflops_per_s']:,.0f} GFLOP/s")
    print(f"  compilation      {train['compile_s']:.2f} s; first step {train['first_step_s']:.3f} s")
    print(f"  peak memory      {train['peak_memory_mb']:,.0f} MB")
    print(f"  data loader      {show(result['loader']['ms'])}; waited for {train['loader_wait_percent']:.2f} %")
    if evaluation := result.get("evaluation"):
        print(f"  evaluation       {show(evaluation['ms'])}, {evaluation['ms_per_batch']:.2f} ms a batch")
    if generation := result.get("generation"):
        rate = generation["decode_tokens_per_s"]["median"]
        print(f"  generation       {generation['rows']} rows of {generation['prompt_tokens']} tokens: prefill", end=" ")
        print(f"{show(generation['prefill_ms'])}, then {rate:,.0f} tok/s")
    for row in result.get("profile", []):
        print(f"  {row['ms']:9.2f} ms  {row['op']}")


if __name__ == "__main__":
    jax_console.run_script(main, ConfigError, jax_data.DataError)

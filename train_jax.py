"""Train a GPT. One script for a laptop, one GPU, a node of them, and several nodes.

python train_jax.py config/train_shakespeare_char.py                  a first model, minutes on a GPU
python train_jax.py config/train_shakespeare_char.py --batch_size=32  flags win over config files
python train_jax.py --init_from=resume --out_dir=out-shakespeare-char go on where a run stopped
python train_jax.py --init_from=resume --eval_only=True               evaluate a run, change nothing
python train_jax.py config/finetune_shakespeare.py --init_from=gpt2   from GPT-2's weights
python train_jax.py config/train_gpt2.py --wandb_log=True             GPT-2 (124M) on OpenWebText
python train_jax.py config/train_gpt2.py --print_config=True          where does each value come from?
srun --ntasks-per-node=1 python train_jax.py config/train_gpt2.py     on all nodes of a SLURM job
"""

if __name__ == "__main__":  # before the other imports, since it starts the script again
    import jax_host_memory

    jax_host_memory.use_huge_pages()


import atexit
import contextlib
import dataclasses
import gc
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import configurator
import jax_console
import jax_cpu_library
import jax_data
import jax_host_memory
import jax_lock
import jax_options
import jax_processes
import jax_run_dir
import jax_run_log
import jax_weights
from configurator import AtLeast0, AtLeast1, Between, ConfigError

NonNegative = Annotated[float, Between(0.0, below=math.inf)]
Probability = Annotated[float, Between(0.0, below=1.0)]


@dataclass(frozen=True)
class TrainConfig:
    """Every option of the trainer. The defaults train GPT-2 (124M) on OpenWebText."""

    out_dir: str = "out_jax"  # where the run lives: config.json, metrics.jsonl, checkpoints/, best/
    eval_interval: AtLeast1 = 2000  # iterations between evaluations (and checkpoints)
    save_interval: AtLeast0 = 0  # iterations between further checkpoints; 0: only with evaluations
    log_interval: AtLeast1 = 1  # iterations between log lines
    eval_iters: AtLeast1 = 200  # batches per split in an evaluation
    eval_only: bool = False  # evaluate once, print, exit; nothing is written
    always_save_checkpoint: bool = True  # save at every evaluation, not only when the validation loss improved
    keep_checkpoints: AtLeast1 = 2  # newest checkpoints kept; the best one is kept apart, in best/
    init_from: str = "scratch"  # scratch | resume | gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a path to weights
    checkpoint: str = "latest"  # with resume and eval_only: latest | best | a step number
    overwrite: bool = False  # start afresh in an out_dir that holds a run: its files are removed
    print_config: bool = False  # show every option with its value and where it came from, then exit
    wandb_log: bool = False  # log to Weights & Biases; offline where nobody is logged in
    wandb_project: str = "owt"  # wandb project
    wandb_run_name: str = "gpt2"  # wandb run name
    dataset: str = "openwebtext"  # a folder under data/ with train.bin and val.bin
    gradient_accumulation_steps: AtLeast1 = 5 * 8  # micro-batches per update, over all devices together
    batch_size: AtLeast1 = 12  # sequences per micro-batch: what one device computes at a time
    block_size: AtLeast1 = 1024  # context length in tokens
    sampling: Literal["random", "epoch"] = "random"  # random crops, or every block once per epoch
    n_layer: AtLeast1 = 12  # transformer blocks
    n_head: AtLeast1 = 12  # attention heads; must divide n_embd
    n_embd: AtLeast1 = 768  # width of the residual stream
    dropout: Probability = 0.0  # 0 for pretraining, 0.1 or more for finetuning
    bias: bool = False  # biases in Linear and LayerNorm, as GPT-2 has; without is a bit better and faster
    gelu: Literal["erf", "tanh"] = "erf"  # erf is nanoGPT's; tanh is what GPT-2's own weights expect
    learning_rate: NonNegative = 6e-4  # the peak, after warm-up
    max_iters: AtLeast0 = 600_000  # updates in all
    weight_decay: NonNegative = 1e-1  # on tensors of two or more dimensions only
    beta1: Probability = 0.9  # AdamW
    beta2: Probability = 0.95  # AdamW; 0.99 where an iteration has few tokens
    grad_clip: Annotated[float, Between(0.0)] = 1.0  # clip the global gradient norm to this; 0 is off
    decay_lr: bool = True  # cosine decay after warm-up; without: constant learning_rate
    warmup_iters: AtLeast0 = 2000  # iterations of linear warm-up
    lr_decay_iters: AtLeast0 = 600_000  # where the cosine ends; about max_iters
    min_lr: NonNegative = 6e-5  # the floor; about learning_rate / 10
    skip_bad_steps: AtLeast0 = 0  # updates in a run that may be skipped because loss or gradient is not finite
    seed: Annotated[int, Between(0, below=2**32)] = 1337  # weights, batches and dropout all follow from it
    device: str = "auto"  # auto | cpu | cuda | gpu | tpu, or one of several: cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute type; auto: bfloat16, on a CPU float32
    deterministic: bool = False  # bit-identical resume on a GPU too; slower
    scan_layers: bool = False  # one layer in a loop: a deep model compiles sooner for a GPU; slower on a CPU
    compile: bool = True  # no meaning here: JAX always compiles. Accepted for nanoGPT's command lines
    backend: str = "nccl"  # no meaning here: JAX picks its own. Accepted for nanoGPT's command lines


EVAL_SEED = 1337  # whatever --seed: runs of several seeds are compared on the same rows

SHOWN_ROWS = 16  # of a batch that diverged
EXIT_MACHINE_FAILED, EXIT_DIVERGED, EXIT_STOPPED = 1, 3, 75  # 2: bad usage or bad input; 130: a second Ctrl-C


class DivergenceError(Exception):
    """The loss or the gradient is not finite."""


ADVICE = "; nothing bad was saved. A lower --learning_rate or more --warmup_iters may help"


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds besides the arrays and the options."""

    step: int = 0  # updates done, which is the number of the next iteration
    best_val_loss: float | None = None
    evaluated_at: int | None = None  # the step of the last evaluation
    wandb_run_id: str | None = None
    bad_steps: int = 0  # updates skipped because loss or gradient was not finite


def evaluation_batches(config: TrainConfig, vocab_size: int, data_dir: Path, mesh) -> list[tuple[Any, Any]]:
    """The batches of an evaluation on the devices, of training and of validation data; the same at every evaluation.

    They are read before anything is computed, so that bad data is told at once. Raises DataError.
    """
    import jax_train_utils as utils

    rows = config.eval_iters * config.batch_size
    padded_R, micro_batches = utils.pad_rows(np.arange(rows), config.batch_size, mesh.size)
    own_rows = padded_R[utils.own_rows(len(padded_R), micro_batches, mesh)]

    def batch_of(split: str) -> tuple[Any, Any]:
        x_RT, y_RT = jax_data.get_batch(
            data_dir, split, 0, seed=EVAL_SEED, batch_size=rows, block_size=config.block_size,
            sampling="spread", vocab_size=vocab_size, rows=own_rows,
        )  # fmt: skip
        return utils.shard_rows(x_RT, micro_batches, mesh), utils.shard_rows(y_RT, micro_batches, mesh)

    return [batch_of("train_eval"), batch_of("val")]


def main(processes: jax_processes.Processes = jax_processes.ALONE) -> int:
    config, sources = configurator.parse_with_sources(TrainConfig)
    out_dir = Path(config.out_dir)
    meta = None
    stop = jax_processes.StopRequest()
    if not (config.eval_only or config.print_config):
        if processes.is_first:
            jax_lock.check(out_dir)
        if config.init_from == "resume":  # all there is is saved already, so that a signal can be answered with 75
            stop.listen()
    steps_there = jax_run_dir.sealed_steps(out_dir)
    if config.init_from == "resume":
        step_dir, skipped = jax_run_dir.find_checkpoint(out_dir, config.checkpoint)
        comment = "# " if config.print_config else ""
        print("".join(f"{comment}{line}\n" for line in skipped), end="")
        meta = jax_run_dir.read_meta(step_dir)
        config, sources = jax_options.inherit_options(TrainConfig(), step_dir, meta)
    if config.print_config:
        jax_options.print_options(config, sources, resumed=meta is not None)
        return 0
    jax_options.check_options(config, sources)
    weights = None
    if config.init_from not in ("scratch", "resume"):
        jax_data.find_data_dir(config.dataset)  # before a download of gigabytes
        weights = jax_weights.open_weights(config.init_from)
        config = jax_options.adopt_shape(config, sources, weights.model)
    data_dir, codec, vocab_size, outlines = jax_options.open_data(config, meta, weights)
    check_unchanged = jax_data.unchanged(data_dir / "train.bin", outlines["train.bin"])
    rows = config.batch_size * config.gradient_accumulation_steps  # of an iteration, over all devices
    print(f"tokens per iteration will be: {rows * config.block_size:,}")
    options = dataclasses.asdict(config)
    if processes.count > 1:
        checkpoint = None if meta is None else step_dir
        jax_processes.meet(processes, jax_options.same_in_all(config, checkpoint, weights, outlines, codec, vocab_size))
        stop.listen()  # a signal that ended one of them now would leave the others waiting

    # ------------------------------------------------------------------------------------------------------------------
    # devices. jax is imported only here, so that a mistake in options or data is told at once

    kind = config.device.partition(":")[0]
    if kind in ("cpu", "mps") or (kind == "auto" and shutil.which("nvidia-smi") is None):
        jax_host_memory.keep_freed_memory()
        if jax_options.memory_of_a_step(config, vocab_size) < 2**28:
            jax_host_memory.no_huge_pages()
        jax_cpu_library.begin(jax_cpu_library.cache_folder)  # by a compiler that has a core to itself until JAX is here

    import jax

    import jax_checkpoint
    import jax_devices
    import jax_train_utils as utils
    from jax_transformer import GPTConfig, flops_per_token, has_tied_head, num_params

    compute = jax_devices.in_own_thread()
    try:
        devices = jax_devices.find_devices(config.device, config.deterministic)
    except ValueError as error:
        of_checkpoint = " (from the checkpoint; --device=auto takes what is here)"
        raise ConfigError(f"{error}{'' if meta is None or 'device' in sources else of_checkpoint}") from None
    layout = utils.lay_out(rows, config.batch_size, len(devices))
    if layout.devices < len(devices) and processes.count > 1:
        raise ConfigError(
            f"an iteration's {rows} rows (batch_size x gradient_accumulation_steps) do not spread evenly over the "
            f"{len(devices)} devices of {processes.count} processes; make them a multiple of {len(devices)}"
        )
    if layout.devices < len(devices):
        idle = ", ".join(map(str, devices[layout.devices :]))
        print(f"using {layout.devices} of {len(devices)} devices, as {rows} rows spread evenly over them; idle: {idle}")
    mesh = utils.make_mesh(devices[: layout.devices])
    dtype = jax_devices.compute_dtype(config.dtype, devices[0])
    where = jax_devices.described(devices[: layout.devices])
    rows_each = f"{layout.micro_batches} x {layout.rows_per_device} rows on each per iteration"
    print(f"computing in {dtype} on {where}, {rows_each}")
    if meta is not None and meta["devices"] not in (where, where.partition(" (")[0], None):  # at first without cores
        print(f"resuming on {where}, which was {meta['devices']}: losses will agree up to rounding, not bit for bit")

    # ------------------------------------------------------------------------------------------------------------------
    # model, optimizer, state

    shape = {key: getattr(config, key) for key in jax_options.MODEL_SHAPE}
    model = GPTConfig(**shape, vocab_size=vocab_size, dropout=config.dropout, dtype=dtype)
    optimizer = utils.make_optimizer(
        beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay, grad_clip=config.grad_clip
    )
    progress = Progress()
    if weights is not None:
        theirs = "OpenAI GPT-2 weights: " if config.init_from in jax_weights.HUB else "the weights of "
        print(f"Initializing from {theirs}{config.init_from}")
        params = jax_weights.read_weights(weights, utils.replicated(mesh), config.block_size)
        # to evaluate needs no optimizer
        state = utils.TrainState(params, None) if config.eval_only else utils.state_of(params, model, optimizer, mesh)
    elif meta is None:
        print("Initializing a new model from scratch")
        state = utils.fresh_state(model, optimizer, config.seed, mesh)
    else:
        print(f"Resuming training from {step_dir}")
        wanted = utils.abstract_state(model, optimizer, mesh, meta["tied_head"])
        if config.eval_only:
            step_dir, meta, restored = jax_checkpoint.restore_beside_a_trainer(
                out_dir, config.checkpoint, step_dir, {"params": wanted.params}
            )
        else:
            restored = jax_checkpoint.restore(step_dir, {"params": wanted.params, "opt_state": wanted.opt_state})
        restored = utils.in_own_memory(restored)
        state = utils.TrainState(restored["params"], restored.get("opt_state"))
        if (dtype == "float16") != (meta["model"]["dtype"] == "float16") and state.opt_state is not None:
            state = utils.TrainState(state.params, (state.opt_state[0], utils.initial_loss_scale(dtype)))
        progress = Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})
    lacks_best = False
    if meta is not None and not config.eval_only:  # what is damaged is told before anything is written
        logged = jax_run_log.validation_losses(out_dir / "metrics.jsonl")
        progress.best_val_loss, lacks_best = jax_run_dir.best_so_far(out_dir, meta, logged, outlines["val.bin"])

    eval_batches = evaluation_batches(config, vocab_size, data_dir, mesh)

    def lr_at(iteration: int) -> float:
        if not config.decay_lr:
            return config.learning_rate
        return utils.warmup_cosine(
            iteration, config.learning_rate, config.warmup_iters, config.lr_decay_iters, config.min_lr
        )

    # ------------------------------------------------------------------------------------------------------------------
    # run directory, logs, checkpoints. Nothing on disk was touched before, and with eval_only nothing is

    wandb_run = None
    writes = processes.is_first and not config.eval_only
    if writes:
        out_dir.mkdir(parents=True, exist_ok=True)
        atexit.register(jax_lock.acquire(out_dir).release)
        stop.listen()  # from here on a signal saves, before the first step too
        if jax_run_dir.sealed_steps(out_dir) != steps_there:
            raise jax_lock.LockError(
                f"another process wrote checkpoints to {out_dir} while this one started; try again"
            )
        if config.overwrite:
            jax_run_dir.remove_run(out_dir)
        jax_run_log.replace_file(out_dir / "config.json", json.dumps(options, indent=1) + "\n")
        if config.wandb_log:
            wandb_run = jax_run_log.start_wandb(
                options, config.wandb_project, config.wandb_run_name, progress.wandb_run_id, out_dir
            )
            progress.wandb_run_id = progress.wandb_run_id if wandb_run is None else wandb_run.id
    peak = jax_run_log.peak_flops(devices[0].device_kind, dtype)
    log = jax_run_log.RunLog(
        out_dir if writes else None,
        resume_step=None if meta is None else progress.step,
        max_iters=config.max_iters,
        tokens_per_iter=rows * config.block_size,
        flops_per_iter=rows * config.block_size * flops_per_token(model),
        peak=None if peak is None else peak * layout.devices,
        wandb_run=wandb_run,
    )
    # This flushes all that was printed so far, into a pipe, too: what comes now may take long.
    log.say(f"number of parameters: {num_params(state.params) / 1e6:.2f}M")
    if meta is not None and not config.eval_only and progress.step >= config.max_iters:
        log.say(
            f"the run is at step {progress.step} of max_iters={config.max_iters} already; a higher one goes on with it"
        )
    saver = jax_checkpoint.Saver(out_dir if writes else None, config.keep_checkpoints)
    jax_processes.ready(processes)
    if lacks_best:
        saver.copy_to_best(progress.step, {})
    evaluate = utils.make_evaluate(
        model, mesh, state.params, eval_batches, config.eval_iters * config.batch_size, config.scan_layers
    )
    if config.eval_only:
        train_loss, val_loss = compute(evaluate, state.params).result()
        log.evaluation(progress.step, train_loss, val_loss, lr_at(progress.step))
        return 0
    stop.share(mesh)
    saved_at = None if meta is None else progress.step
    last_save_failed = False

    @contextlib.contextmanager
    def telling_of_a_failed_save() -> Iterator[None]:
        """The run goes on without that checkpoint; the next save tries again, the last step's in any case."""
        nonlocal saved_at, last_save_failed
        try:
            yield
        except jax_run_dir.SaveError as error:
            saved_at, last_save_failed = saved_at if error.of_best else None, True
            # so that the next evaluation better than what best/ really holds is an improvement
            progress.best_val_loss = jax_run_dir.best_val_loss(out_dir, outlines["val.bin"])
            progress.evaluated_at = None
            steps = jax_run_dir.sealed_steps(out_dir)
            newest = f"The newest checkpoint is that of step {steps[0]}" if steps else "There is no checkpoint yet"
            jax_console.complain(f"error: {error}. {newest}")

    def save(is_best: bool, last: bool) -> None:
        nonlocal saved_at, last_save_failed
        with telling_of_a_failed_save():
            saver.wait()  # for the one before
        log.say(f"saving checkpoint to {out_dir}")
        log.retry()  # a checkpoint of step k promises that the log up to k is on disk
        about: dict[str, Any] = {"config": options, "model": dataclasses.asdict(model), "codec": codec}
        about |= {"tied_head": has_tied_head(state.params), "data": outlines, "devices": where}
        saved_at, last_save_failed = progress.step, False
        with telling_of_a_failed_save():
            about |= dataclasses.asdict(progress)
            saver.save(progress.step, state.params, state.opt_state, about, is_best=is_best, last=last)

    # ------------------------------------------------------------------------------------------------------------------
    # training

    rows_ABT = utils.abstract_rows(layout, config.block_size, mesh)
    train_step = utils.compile_ahead(  # on a CPU while the model is evaluated for the first time
        utils.compile_train_step(model, optimizer, config.seed, mesh, config.scan_layers),
        state, rows_ABT, rows_ABT, np.float32(0), np.uint32(0),
    )  # fmt: skip
    own_rows = utils.own_rows(rows, layout.micro_batches, mesh)  # all, unless other processes compute some
    first_step = progress.step
    timed_since, timed_from = time.perf_counter(), first_step  # the time per iteration is the mean since then
    in_flight: tuple[int, dict[str, jax.Array]] | None = None  # metrics are read one step behind

    def make_batch(iteration: int) -> list[jax.Array]:
        """An iteration's rows on the devices. Runs in the prefetch thread."""
        pair = jax_data.get_batch(
            data_dir, "train", iteration, seed=config.seed, batch_size=rows, block_size=config.block_size,
            sampling=config.sampling, vocab_size=vocab_size, rows=own_rows,
        )  # fmt: skip
        if processes.count == 1:  # several would see it at different steps, and wait for each other for ever
            check_unchanged()
        return [utils.shard_rows(rows_RT, layout.micro_batches, mesh) for rows_RT in pair]

    def rows_of(iteration: int) -> str:
        """Which text an iteration saw, for a person who wants to look at it."""
        starts_R = jax_data.batch_starts(
            data_dir, "train", iteration, seed=config.seed, batch_size=rows, block_size=config.block_size,
            sampling=config.sampling,
        )  # fmt: skip
        shown = ", ".join(map(str, starts_R[:SHOWN_ROWS]))
        more = f" and {rows - SHOWN_ROWS} more (jax_data.batch_starts)" if rows > SHOWN_ROWS else ""
        return f"its rows begin at the tokens {shown}{more} of {data_dir / 'train.bin'}"

    def report_in_flight() -> None:
        """Log the iteration in flight, waiting for it to be through. Raises DivergenceError."""
        nonlocal timed_since, timed_from, in_flight
        if in_flight is None:
            return
        iteration, metrics = in_flight
        in_flight = None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}  # host-device sync
        if not values["finite"] and values["loss_scale"] <= 1:  # in float16 an overflow first halves the scale
            progress.bad_steps += 1
            what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            if progress.bad_steps > config.skip_bad_steps:
                raise DivergenceError(f"training diverged at iteration {iteration}: {what}; {rows_of(iteration)}")
            log.say(
                f"skipped the update of iteration {iteration}: {what}; {rows_of(iteration)}; "
                f"{progress.bad_steps} of {config.skip_bad_steps} allowed"
            )
        if iteration % config.log_interval == 0:
            now = time.perf_counter()
            seconds = (now - timed_since) / (iteration + 1 - timed_from)
            timed_since, timed_from = now, iteration + 1
            log.iteration(iteration, values["loss"], lr_at(iteration), values["grad_norm"], seconds)

    batches = jax_data.prefetch(make_batch, progress.step, config.max_iters)
    bad_data: jax_data.DataError | None = None
    exit_code = EXIT_MACHINE_FAILED  # unless the loop comes to its end
    try:
        while True:
            step, last = progress.step, progress.step >= config.max_iters
            save_due = step > 0 and config.save_interval > 0 and step % config.save_interval == 0
            stopping = stop.agreed()
            if (last or step % config.eval_interval == 0) and progress.evaluated_at != step and not stopping:
                report_in_flight()
                paused_at = time.perf_counter()
                train_loss, val_loss = compute(evaluate, state.params).result()
                log.evaluation(step, train_loss, val_loss, lr_at(step))
                if not math.isfinite(train_loss + val_loss):
                    raise DivergenceError(f"training diverged before step {step}: the evaluation is not finite")
                with telling_of_a_failed_save():
                    saver.wait()  # whether it failed decides what is best so far
                progress.evaluated_at = step
                best = progress.best_val_loss
                improved = best is None or val_loss < best
                if improved:
                    progress.best_val_loss = val_loss
                if step > 0 and (improved or last or save_due or config.always_save_checkpoint):
                    if saved_at != step:
                        save(is_best=improved, last=last)
                    elif improved:  # saved by a signal before it could be evaluated
                        with telling_of_a_failed_save():
                            saver.copy_to_best(step, {"best_val_loss": val_loss, "evaluated_at": step})
                stopping = stop.agreed()  # an evaluation may take minutes
                timed_since += time.perf_counter() - paused_at  # evaluations do not count as training time
            elif save_due and saved_at != step and not stopping:
                report_in_flight()
                paused_at = time.perf_counter()
                save(is_best=False, last=last)
                timed_since += time.perf_counter() - paused_at  # nor do saves
            if last or stopping:
                break

            try:
                batch = next(batches)
            except jax_data.DataError as error:  # what was computed before it is good, and is saved first
                bad_data = error
                break
            computing = compute(train_step.result(), state, *batch, np.float32(lr_at(step)), np.uint32(step))
            report_in_flight()  # the iteration before, while the device computes this one
            state, metrics = computing.result()
            if step == first_step:
                saver.prepare()
                # What imports and compilers left stays, so that no later collection walks over it; the rest goes back.
                gc.collect()
                gc.freeze()
                jax_host_memory.give_back_freed_memory()
            in_flight = step, metrics
            progress.step += 1
            with telling_of_a_failed_save():
                saver.check()
        report_in_flight()
        if saved_at != progress.step and (bad_data is None or progress.step > 0):  # at 0 there is nothing to keep
            save(is_best=False, last=True)
        with telling_of_a_failed_save():
            saver.wait()
        finished = progress.step >= config.max_iters and progress.evaluated_at == progress.step
        exit_code = EXIT_STOPPED if stopping and not finished else 0
        if last_save_failed:
            jax_console.complain(
                "error: the last save failed. Put that right; --init_from=resume goes on from the newest checkpoint"
            )
            exit_code = EXIT_MACHINE_FAILED
    except (DivergenceError, jax_run_dir.NotFiniteError) as error:
        jax_console.complain(f"error: {error}{ADVICE}")
        exit_code = EXIT_DIVERGED
    finally:
        batches.close()
        # What is not finite in its weights, the loss has shown meanwhile.
        with telling_of_a_failed_save(), contextlib.suppress(jax_run_dir.NotFiniteError):
            saver.close()
        exit_code = log.close(exit_code)
    if bad_data is not None:
        raise bad_data
    if stopping and exit_code == EXIT_STOPPED:
        print(f"stopped by {stopping.name} at step {progress.step} and saved; --init_from=resume goes on from there")
    return exit_code


BAD_INPUT = (
    ConfigError,
    jax_data.DataError,
    jax_run_dir.CheckpointError,
    jax_run_log.MetricsError,
    jax_weights.WeightsError,
    jax_lock.LockError,
)

if __name__ == "__main__":
    jax_console.run_script(
        lambda: jax_processes.together(main, *BAD_INPUT),
        *BAD_INPUT,
        jax_processes.ProcessesError,
        machine_failed=(jax_run_dir.SaveError, OSError),
    )

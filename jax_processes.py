"""Several processes that train one model together: one for each node of a cluster, or one for each GPU.

The environment says that there are several: SLURM's variables (srun), torchrun's (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by hand. Each process runs the whole
program on its own rows of each batch, and all come to the same decisions at the same step: what these follow from is
the same in all (options, losses), or is agreed upon (signals). The first process alone prints, logs and saves.

A process that fails while it sets up tells the others, and all end. One that fails later leaves at once: the others
find it gone in their next exchange of gradients, or JAX ends them when it has not been heard of for HEARTBEAT_SECONDS.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EXIT_INTERRUPTED = 130
START_SECONDS = 300  # until all processes have to be there
HEARTBEAT_SECONDS = 100  # without a sign of life, and a process counts as dead
PATIENCE_SECONDS = 24 * 3600  # with one that lives: it may download weights, or write a large checkpoint


class ProcessesError(Exception):
    """The processes do not come together, or do not do the same. One line, for the person at the terminal."""


@dataclass
class Processes:
    """Which of how many processes this one is."""

    index: int = 0
    count: int = 1
    address: str = ""  # host:port on which the first one waits for the others
    device: int | None = None  # the only device of its node that this process uses; None: all
    times_met: int = 0
    set_up: bool = False  # from here on the others are computing, and cannot be told of a mistake
    told: bool = False  # another process says what is wrong
    failed: int | None = None  # the exit code of a failure while the others compute

    @property
    def is_first(self) -> bool:
        return self.index == 0


ALONE = Processes()


# ----------------------------------------------------------------------------------------------------------------------
# start


def find(env: Mapping[str, str]) -> Processes:
    """What the environment says. Raises ProcessesError if that makes no sense."""
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        index, count = "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"
        host, colon, port = env.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
        one_each = None
    elif env.get("RANK") and env.get("WORLD_SIZE"):
        index, count = "RANK", "WORLD_SIZE"
        host, colon, port = env.get("MASTER_ADDR", ""), ":", env.get("MASTER_PORT", "")
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port.isdecimal():
            port = str(int(port) + 1)  # torchrun itself listens on the other
        one_each = "LOCAL_RANK" if env.get("LOCAL_WORLD_SIZE", "1") != "1" else None
    elif all(name in env for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")):
        index, count = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
        # the first of node[001-004,7],other, and a port that two jobs on one node hardly share
        nodes = re.match(r"([^\[,]+)(?:\[(\w+))?", env["SLURM_STEP_NODELIST"])
        host, colon = "".join(nodes.groups("")) if nodes else "", ":"
        port = str(61440 + _number(env, "SLURM_JOB_ID") % 4096)
        one_task_a_node = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        one_each = None if one_task_a_node else "SLURM_LOCALID"
    else:
        return ALONE
    if _number(env, count) == 1:
        return ALONE
    if not _number(env, index) < _number(env, count):
        raise ProcessesError(f"{index}={env[index]} must be below {count}={env[count]}")
    port = env.get("JAX_COORDINATOR_PORT", port)
    if not (host and colon and port.isdecimal()):
        where = "MASTER_ADDR:MASTER_PORT" if count == "WORLD_SIZE" else "JAX_COORDINATOR_ADDRESS=host:port"
        raise ProcessesError(f"{count}={env[count]}, but {where} does not say where the first process is")
    # Where each process sees one GPU only, that is already its own.
    sees_one = "," not in env.get("CUDA_VISIBLE_DEVICES", ",")
    device = None if one_each is None or sees_one or "JAX_LOCAL_DEVICE_IDS" in env else _number(env, one_each)
    if not re.fullmatch(r"\d+(,\d+)*", local := env.get("JAX_LOCAL_DEVICE_IDS", "0")):
        raise ProcessesError(f"JAX_LOCAL_DEVICE_IDS={local} must be the numbers of devices, as in 0,1")
    return Processes(_number(env, index), _number(env, count), f"{host}:{port}", device)


def _number(env: Mapping[str, str], name: str) -> int:
    if not env.get(name, "").isdecimal():
        raise ProcessesError(f"{name} must be a whole number in each process's environment, not {env.get(name)!r}")
    return int(env[name])


def together(main: Callable[[Processes], int], *bad_input: type[Exception]) -> int:
    """`main` in all the processes of this run, to the first one's exit code. In a process that is alone, just `main`.

    All but the first are silent. What ends one of them while it sets up ends all with one exit code, 2 where it is
    `bad_input`, and one of them says why. Raises what `main` does, ProcessesError, and ConnectionError where another
    process is gone.
    """
    processes = find(os.environ)
    if processes.count == 1:
        return main(ALONE)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # an exception, so that the others are told
    _connect(processes)
    atexit.register(_leave_if_failed, processes)  # after the lock is released, and before JAX waits for the others
    stderr = sys.stderr
    if not processes.is_first:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print, too
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  to the end; a crash of Python itself is still seen
    try:
        _agree_on_the_count(processes)
        exit_code = _to_its_end(processes, main)
        return _same_exit_code(processes, exit_code)
    except BaseException as error:
        if isinstance(error, SystemExit) and processes.told:
            raise
        first_to_fail = True
        if processes.set_up:
            processes.failed = _exit_code(error, bad_input)
        else:
            with contextlib.suppress(RuntimeError):  # with nobody left to tell, it says itself what was wrong
                said = _exchange(processes, {FAILED: _exit_code(error, bad_input)})
                first_to_fail = _first_to_fail(said) == processes.index
        if first_to_fail and not processes.is_first:
            sys.stderr = stderr
            print(f"process {processes.index} on {socket.gethostname()}: ", end="", file=stderr)
        from_xla = type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)  # a ValueError, when told at once
        if processes.set_up and from_xla and "RESOURCE_EXHAUSTED" not in str(error):
            # so it looks when another has gone; what that had to say, it has said itself
            raise ConnectionError(f"the exchange with the other processes failed: {error}") from error
        raise


def _to_its_end(processes: Processes, main: Callable[[Processes], int]) -> int:
    """The exit code of main. Raises what it does, and ProcessesError where it ends before training in some only."""
    try:
        exit_code = main(processes)
    except SystemExit as error:
        if error.code:
            raise
        exit_code = 0  # --help
    if not processes.set_up:  # asked only to print, or a run that is finished: the others would wait for this one
        meet(processes, {GOES_ON: False})
    return exit_code


def _exit_code(error: BaseException, bad_input: tuple[type[Exception], ...]) -> int:
    """What jax_console.run_script makes of it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return 2 if isinstance(error, (ProcessesError, *bad_input)) else 1


def _connect(processes: Processes) -> None:
    import jax

    missing = f"not all of {processes.count} processes met at {processes.address} within {START_SECONDS} s"
    if processes.is_first:
        port = int(processes.address.rpartition(":")[2])
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("", port))
            except (OSError, OverflowError) as error:  # JAX would end in a crash
                raise ProcessesError(
                    f"the first process cannot listen on port {port} ({error}); JAX_COORDINATOR_PORT, the same in all "
                    f"processes, chooses another"
                ) from None

    def give_up() -> None:  # JAX would end the process with a stack of C++
        hint = "start them all, each with its own number, and with this address of the first one"
        os.write(2, f"error: {missing}; {hint}\n".encode())
        os._exit(2)

    too_late = threading.Timer(START_SECONDS, give_up)
    too_late.daemon = True
    too_late.start()
    # It would take SIGTERM for itself, and have each process save when it likes.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.address,
            processes.count,
            processes.index,
            local_device_ids=None if processes.device is None else [processes.device],
            cluster_detection_method="deactivate",  # it would take SLURM's local task number for that of a GPU
            initialization_timeout=START_SECONDS + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=PATIENCE_SECONDS,
        )
    except RuntimeError as error:
        raise ProcessesError(f"{missing}: {error}") from None
    finally:
        too_late.cancel()


def _leave_if_failed(processes: Processes) -> None:
    """The process's end without JAX's, which is to wait for the others."""
    if processes.failed is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(processes.failed)


# ----------------------------------------------------------------------------------------------------------------------
# agreement


FAILED, GOES_ON = "failed", "goes on"  # what a process says of itself: its exit code; whether it will train


def _agree_on_the_count(processes: Processes) -> None:
    """Raise ProcessesError where this process was told of more or fewer of them than the first one."""
    if processes.is_first:
        _store().key_value_set("nanogpt/count", str(processes.count))
        return
    told, processes.count = processes.count, int(_store().blocking_key_value_get("nanogpt/count", 1000 * START_SECONDS))
    if told != processes.count:
        raise ProcessesError(f"this process was told that it is one of {told}, and process 0 of {processes.count}")


def meet(processes: Processes, facts: dict[str, Any]) -> None:
    """Wait until all are here. facts: name -> what has to be the same in all. Raises ProcessesError if it is not."""
    if processes.count == 1:
        return
    facts = {GOES_ON: True} | facts
    said = _exchange(processes, facts)
    if (failed := _first_to_fail(said)) is not None:
        processes.told = True
        if processes.is_first:
            print(f"error: process {failed} has stopped; its own line says why", file=sys.stderr)
        raise SystemExit(said[failed][FAILED])
    if len({each[GOES_ON] for each in said}) > 1:
        raise ProcessesError(
            "some processes are only to print (--help, --print_config); all need the same command line"
        )
    differing = [(i, name) for name in facts for i in range(processes.count) if said[i].get(name) != said[0].get(name)]
    if differing:
        i, name = differing[0]
        raise ProcessesError(
            f"process {i} has {name}={str(said[i].get(name))[:100]}, and process 0 has {str(said[0].get(name))[:100]}; "
            f"all need the same command line, and the same files under the same names"
        )


def ready(processes: Processes) -> None:
    """The last meeting before the processes compute together."""
    meet(processes, {})
    processes.set_up = processes.count > 1


def _same_exit_code(processes: Processes, exit_code: int) -> int:
    """The exit code of the first process, in all: it alone knows whether the last save succeeded."""
    if processes.is_first:
        _store().key_value_set("nanogpt/exit", str(exit_code))
    return int(_store().blocking_key_value_get("nanogpt/exit", 1000 * PATIENCE_SECONDS))


def _exchange(processes: Processes, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process says at this meeting. Waits for all of them."""
    processes.times_met += 1
    meeting = f"nanogpt/{processes.times_met}"
    _store().key_value_set(f"{meeting}/{processes.index}", json.dumps(facts))
    every = range(processes.count)
    return [json.loads(_store().blocking_key_value_get(f"{meeting}/{i}", 1000 * PATIENCE_SECONDS)) for i in every]


def _first_to_fail(said: list[dict[str, Any]]) -> int | None:
    return next((i for i, facts in enumerate(said) if FAILED in facts), None)


def _store() -> Any:
    """JAX's own store of keys and values for its processes: it needs no device, and so works when there is none."""
    from jax._src import distributed  # there is no public way to it

    return distributed.global_state.client


# ----------------------------------------------------------------------------------------------------------------------
# signals


class StopRequest:
    """SIGTERM, Ctrl-C or SIGHUP (a terminal that is closed): finish the step under way, save, exit 75.

    A second Ctrl-C stops at once, without saving.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted = False
        self._highest: Callable[[int], int] | None = None

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._request)

    def _request(self, signum: int, _frame: object) -> None:
        # SIGTERM and one Ctrl-C are what some launchers make of a single Ctrl-C: that saves.
        if self._interrupted and signum == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"stopped at once; nothing was saved since the last checkpoint\n")
            os._exit(EXIT_INTERRUPTED)
        self.signal = signal.Signals(signum)  # nothing more: saving inside a handler can hang
        self._interrupted |= signum == signal.SIGINT
        how = "again" if self._interrupted else "twice"
        with contextlib.suppress(OSError):  # a console that is gone
            os.write(2, f"{self.signal.name}: stopping after this step; Ctrl-C {how} stops at once\n".encode())

    def share(self, mesh: Any) -> None:
        """From here on a signal to any process is one to all, where there are several: `agreed` says when."""
        if any(device.process_index != mesh.devices.flat[0].process_index for device in mesh.devices.flat):
            self._highest = _highest_of_all(mesh)

    def agreed(self) -> signal.Signals | None:
        """The signal to stop for here. Where processes share it, all have to ask equally often."""
        if self._highest is None:
            return self.signal
        highest = self._highest(self.signal or 0)
        return signal.Signals(highest) if highest else None


def _highest_of_all(mesh: Any) -> Callable[[int], int]:
    """A function from a number of this process to the highest that any process gave in the call before this one.

    That one is there already, so that nobody waits: the devices got it before the step they work on.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    each, all_the_same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    highest = jax.jit(jnp.max, out_shardings=all_the_same)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    in_flight = None

    def exchange(number: int) -> int:
        nonlocal in_flight
        mine = np.full(len(mesh.local_devices), number, np.int32)
        before, in_flight = in_flight, highest(jax.make_array_from_process_local_data(each, mine))
        if on_cpu:
            in_flight.block_until_ready()  # host-device sync: two exchanges at once could wait for each other for ever
        return 0 if before is None else int(before)  # host-device sync

    return exchange

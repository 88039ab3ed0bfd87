"""How many processes run, and a refusal when it is not the number that was asked for.

`accelerate launch` with a CPU config starts ONE process whatever `num_processes` says, and says nothing. torchrun
starts as many as asked, on a CPU with gloo. torch is not imported here at module level.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from llmrl.errors import DistributedError, UsageError


def world_size() -> int:
    """Return the number of processes: of the process group if there is one, else what the launcher announced."""
    group = _process_group()
    return group.get_world_size() if group is not None else _environment_number("WORLD_SIZE", 1)


def rank() -> int:
    """Return this process's number, 0 when it is alone."""
    group = _process_group()
    return group.get_rank() if group is not None else _environment_number("RANK", 0)


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return rank() == 0


def check_processes(expected: int | None = None, *, announce: bool = True) -> int:
    """Compare the number of processes with what was asked for; return it.

    Args:
        expected: the number asked for, or None to ask only what the environment shows: `accelerate launch` on a CPU
            sets MASTER_ADDR for several processes and starts one without WORLD_SIZE.
        announce: print one line from rank 0, `processes: 2 (gloo, rank 0 on cpu)`.

    Raises:
        DistributedError: the numbers differ; the message names the command that starts the right number.
    """
    actual = world_size()
    script = os.path.basename(sys.argv[0]) or "script.py"
    if expected is None and _launched_too_few():
        raise DistributedError(
            "expected several processes, got 1: accelerate launch starts a single process on a CPU.\n"
            f"Start them with: torchrun --nproc_per_node 2 {script} ..."
        )
    if expected is not None and actual != expected:
        reason = ": accelerate launch starts a single process on a CPU" if actual == 1 and _on_cpu() else ""
        command = f"torchrun --nproc_per_node {expected} {script} ..." if expected > 1 else f"python {script} ..."
        raise DistributedError(f"expected {_count(expected)}, got {actual}{reason}.\nStart them with: {command}")
    if announce and is_main_process():
        print(f"processes: {actual} ({_backend(actual)}rank 0 on {_device()})", flush=True)
    return actual


def check_launch(arguments: Any) -> None:
    """Refuse processes that would each train alone, and one that would split batches over several GPUs.

    Args:
        arguments: transformers' TrainingArguments.

    Raises:
        DistributedError: names what to start.
    """
    if arguments.world_size != world_size():
        raise DistributedError(
            f"{world_size()} processes were started and each would train alone: start them with torchrun or accelerate launch"
        )
    if arguments.n_gpu > 1:
        raise DistributedError(
            f"one process sees {arguments.n_gpu} GPUs: start one a GPU with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )


def split_batch(batch_size: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Return (rows a forward on one process, forwards a step) of a global batch.

    Args:
        batch_size: rows a step over all processes.
        micro_batch_size: most rows in memory at once on a process; None: its whole share of a step.

    Raises:
        UsageError: the processes cannot share the batch evenly.
    """
    processes = world_size()
    if batch_size % processes:
        raise UsageError(f"--batch_size {batch_size} cannot be shared by {processes} processes: use a multiple")
    own = batch_size // processes
    most = micro_batch_size or own
    forwards = next(n for n in range(1, own + 1) if own % n == 0 and own // n <= most)
    return own // forwards, forwards


def join_processes(*, patience: timedelta | None = None) -> None:
    """Start the process group when a launcher started several processes (gloo on a CPU, nccl on GPUs).

    Args:
        patience: how long one process waits for the others; None leaves it to torch (10 to 30 minutes).
    """
    if world_size() > 1 and _process_group() is None:
        import torch

        backend = (
            "gloo" if patience or not torch.cuda.is_available() else "nccl"
        )  # nccl keeps a GPU busy while it waits
        try:
            torch.distributed.init_process_group(backend, timeout=patience)
        except ValueError as error:
            raise DistributedError(
                f"WORLD_SIZE says {world_size()} processes, but no launcher set the rest ({str(error).splitlines()[0]})\n"
                "start with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from error


def barrier() -> None:
    """Wait for all processes; nothing to wait for when there is one."""
    group = _process_group()
    if group is not None:
        group.barrier()


def sum_over_processes(numbers: Sequence[int]) -> list[int]:
    """Return the sums of each number over all processes; like `barrier`, it waits for all."""
    group = _process_group()
    if group is None:
        return list(numbers)
    import torch

    device = "cuda" if group.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    group.all_reduce(sums)
    return sums.tolist()


def _launched_too_few() -> bool:
    """Recognise what accelerate's simple launcher leaves behind when it was asked for more than one CPU process."""
    environment = os.environ
    several = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_ADDR" in environment
    # torchrun sets the first; the others are the sizes that MPI launchers set
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return several and world_size() == 1 and not any(name in environment for name in sizes)


def _process_group() -> Any:
    torch = sys.modules.get("torch")  # no process group without it
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def _environment_number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _on_cpu() -> bool:
    return _device() == "cpu"


def _device() -> str:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"
    if torch.cuda.is_available():
        return f"cuda:{_environment_number('LOCAL_RANK', 0)}"
    return "cpu"


def _backend(actual: int) -> str:
    group = _process_group()
    if group is not None:
        return f"{group.get_backend()}, "
    return "group not started, " if actual > 1 else ""


def _count(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"

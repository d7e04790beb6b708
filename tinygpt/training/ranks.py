"""Data parallelism: several processes, on one machine or many, train one model over MPI.

`mpirun -n 4 python train.py ...` starts them. Each process computes the gradients of its share of a
step's sequences; these are summed over all processes in a few large buckets, and every process
takes the same step. mpi4py is needed only where a launcher has started several processes.
"""

import functools
import math
import sys
import time
import zlib
from contextlib import contextmanager

import numpy as np
from tinygrad import Tensor

from tinygpt import device
from tinygpt.machine import cpu_count, cpus
from tinygpt.streams import print_error

BUCKET = 8 << 20  # elements, 32 MB: far above where the network's latency would be felt


class RanksError(ValueError):
    """The processes of a run cannot train together."""


class Ranks:
    """The processes of a run: this one is `rank` of `size`, on its machine `local_rank` of
    `local_size`. Without a communicator there is one process.
    """

    def __init__(self, comm=None, local=None):
        self._comm, self._local = comm, local
        self.rank, self.size = (comm.rank, comm.size) if comm else (0, 1)
        self.local_rank, self.local_size = (local.rank, local.size) if local else (0, 1)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and saves."""
        return self.rank == 0

    def threads(self) -> int:
        """This process's share of the CPUs that it may use."""
        if self._local is None:
            return cpu_count()
        sharing = self._local.allgather(sorted(cpus())).count(sorted(cpus()))
        return max(1, cpu_count() // sharing)

    def shard(self, numbers: range) -> range:
        """This process's share of the numbers: every size-th."""
        return numbers[self.rank::self.size]

    def split(self, batch_size: int, count: int) -> tuple[int, int]:
        """The rows and the number of micro-batches that `count` micro-batches of batch_size rows
        are split into, so that every process gets as many. Raises RanksError where the rows do not
        suffice."""
        parts = self.size // math.gcd(self.size, count)
        if batch_size % parts:
            raise RanksError(f"the {count * batch_size} sequences of a step (batch_size="
                             f"{batch_size} times gradient_accumulation_steps={count}) cannot be "
                             f"shared by {self.size} processes: choose a multiple of {parts} as "
                             "batch_size, or another number of processes")
        return batch_size // parts, count * parts

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        """Sums a contiguous array over all processes, in place."""
        if self._comm:
            from mpi4py import MPI

            self._comm.Allreduce(MPI.IN_PLACE, array)
        return array

    def all_max(self, *values: float) -> list[float]:
        """The maximum of each value over all processes."""
        if self._comm is None:
            return list(values)
        return [max(column) for column in zip(*self._comm.allgather(values), strict=True)]

    def broadcast(self, value):
        """The value of process 0."""
        return self._comm.bcast(value) if self._comm else value

    def check_same(self, **values) -> None:
        """Raises RanksError, in every process, where a value differs between processes."""
        if self._comm is None:
            return
        main, *others = self._comm.allgather(values)
        for rank, theirs in enumerate(others, 1):
            for name, value in theirs.items():
                if value != main[name]:
                    raise RanksError(f"process {rank} has {name} {value}, process 0 {main[name]}: "
                                     "start all with the same flags, data and checkpoints")

    @contextmanager
    def local_main_first(self):
        """Runs its block in one process of each machine first, then in the others."""
        if self._local and self.local_rank:
            self._local.Barrier()
        yield
        if self._local and not self.local_rank:
            self._local.Barrier()

    def barrier(self) -> None:
        """Waits until every process has called it."""
        if self._comm:
            self._comm.Barrier()

    def abort(self, status: int, message: str = "") -> None:
        """Prints the message on stderr and ends every process with that status. Returns where there
        is one process."""
        if self._comm and self.rank:
            time.sleep(1)  # process 0 may have had the same error, and prints it once
            message = message and f"process {self.rank} of {self.size}: {message}"
        if message:
            print_error(message)
        if self._comm:
            self._comm.Abort(status)


class Buckets:
    """Sums float32 tensors over the processes, in large buffers on the host."""

    def __init__(self, ranks: Ranks, tensors: list[Tensor]):
        self.ranks = ranks
        self.groups: list[list[Tensor]] = [[]]
        for tensor in tensors:
            if self.groups[-1] and _numel([*self.groups[-1], tensor]) > BUCKET:
                self.groups.append([])
            self.groups[-1].append(tensor)
        self.buffer = np.empty(max(map(_numel, self.groups)), np.float32)

    def all_sum(self) -> None:
        """Replaces every tensor by its sum over all processes."""
        for group in self.groups:
            bucket = self.buffer[:_numel(group)]
            parts = np.split(bucket, np.cumsum([t.numel() for t in group])[:-1])
            for part, tensor in zip(parts, group, strict=True):
                part[:] = device.read(tensor).reshape(-1)
            self.ranks.all_sum(bucket)
            for part, tensor in zip(parts, group, strict=True):
                device.write(tensor, part.reshape(tensor.shape))


def checksum(tensors: dict[str, Tensor]) -> int:
    """The CRC-32 of the contents of tensors."""
    return functools.reduce(lambda crc, t: zlib.crc32(device.read(t).tobytes(), crc),
                            tensors.values(), 0)


def _numel(tensors: list[Tensor]) -> int:
    return sum(math.prod(t.shape) for t in tensors)


@functools.cache
def world() -> Ranks:
    """The processes that were launched together with this one. Raises RanksError where mpi4py is
    missing or does not find the others."""
    rank, size = device.launched()
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != size:
            raise RuntimeError(f"it finds {comm.size}: it uses another MPI than mpirun")
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        if rank:
            sys.exit(2)  # process 0 prints why
        raise RanksError(f"mpirun started {size} processes, which need mpi4py to work together "
                         f"({error}): pip install mpi4py mpich") from error
    ranks = Ranks(comm, comm.Split_type(MPI.COMM_TYPE_SHARED))
    _abort_on_errors(ranks)
    return ranks


def _abort_on_errors(ranks: Ranks) -> None:
    """Lets an unhandled error end the other processes too, which would wait for ever."""
    previous = sys.excepthook

    def hook(kind, error, trace):
        previous(kind, error, trace)
        ranks.abort(1, f"ended by {kind.__name__}")

    sys.excepthook = hook

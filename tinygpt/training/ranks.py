"""Several processes, on one machine or on many, that train one model together, over MPI.

`mpirun -n 4 python train.py ...` starts them. Each finds the gradients of its own share of a step's
micro-batches; the sum of all, made in a few large buckets, is what every process then takes the
same step with. mpi4py is asked for only where a launcher has started several.
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
    """The processes of a run cannot work together."""


class Ranks:
    """The processes of a run, of which this one is number `rank` of `size`; `local_rank` of
    `local_size` on its machine.

    Without a communicator it is alone: whatever is summed or compared is its own.
    """

    def __init__(self, comm=None, local=None):
        self._comm, self._local = comm, local
        self.rank, self.size = (comm.rank, comm.size) if comm else (0, 1)
        self.local_rank, self.local_size = (local.rank, local.size) if local else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process is the one that tells and saves."""
        return self.rank == 0

    def threads(self) -> int:
        """This process's share of the CPUs that it may use."""
        if self._local is None:
            return cpu_count()
        sharing = self._local.allgather(sorted(cpus())).count(sorted(cpus()))
        return max(1, cpu_count() // sharing)

    def share(self, numbers: range) -> range:
        """Those of the numbers that are this process's: every size-th."""
        return numbers[self.rank::self.size]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of all processes' arrays of one shape, in place of this one's; contiguous."""
        if self._comm:
            from mpi4py import MPI

            self._comm.Allreduce(MPI.IN_PLACE, array)
        return array

    def largest(self, *values: float) -> list[float]:
        """The largest of all processes' values, each by itself."""
        if self._comm is None:
            return list(values)
        return [max(column) for column in zip(*self._comm.allgather(values), strict=True)]

    def from_first(self, value):
        """What process 0 has for value."""
        return self._comm.bcast(value) if self._comm else value

    def check_same(self, **facts) -> None:
        """Raises RanksError, in every process, where the facts are not the same in all of them."""
        if self._comm is None:
            return
        for name, values in zip(facts, zip(*(f.values() for f in self._comm.allgather(facts)),
                                           strict=True), strict=True):
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise RanksError(f"process {rank} has {name} {value}, process 0 {values[0]}: "
                                     "start all with the same flags, data and checkpoints")

    @contextmanager
    def one_first(self):
        """What is within is done by one process of each machine, and then by the others."""
        if self._local and self.local_rank:
            self._local.Barrier()
        yield
        if self._local and not self.local_rank:
            self._local.Barrier()

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self._comm:
            self._comm.Barrier()

    def abort(self, status: int, message: str = "") -> None:
        """Tells why, on stderr, and ends every process with that status; returns where this one
        is alone."""
        if self._comm and self.rank:
            time.sleep(1)  # process 0 may have met the same, and tells it once
            message = message and f"process {self.rank} of {self.size}: {message}"
        if message:
            print_error(message)
        if self._comm:
            self._comm.Abort(status)


class Buckets:
    """Float32 tensors that are summed over the processes, in large buffers on the host."""

    def __init__(self, ranks: Ranks, tensors: list[Tensor]):
        self.ranks = ranks
        self.groups: list[list[Tensor]] = [[]]
        for tensor in tensors:
            if self.groups[-1] and _elements([*self.groups[-1], tensor]) > BUCKET:
                self.groups.append([])
            self.groups[-1].append(tensor)
        self.buffer = np.empty(max(map(_elements, self.groups)), np.float32)

    def sum(self) -> None:
        """Puts the sum over all processes in the place of every tensor."""
        for group in self.groups:
            bucket = self.buffer[:_elements(group)]
            parts = np.split(bucket, np.cumsum([t.numel() for t in group])[:-1])
            for part, tensor in zip(parts, group, strict=True):
                part[:] = device.read(tensor).reshape(-1)
            self.ranks.sum(bucket)
            for part, tensor in zip(parts, group, strict=True):
                device.write(tensor, part.reshape(tensor.shape))


def checksum(tensors: dict[str, Tensor]) -> int:
    """A number that tells tensors of different contents apart."""
    return functools.reduce(lambda crc, t: zlib.crc32(device.read(t).tobytes(), crc),
                            tensors.values(), 0)


def _elements(tensors: list[Tensor]) -> int:
    return sum(math.prod(t.shape) for t in tensors)


@functools.cache
def world() -> Ranks:
    """The processes that were launched together with this one. Raises RanksError where MPI is
    missing or did not find the others."""
    rank, size = device.launched()
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != size:
            raise RuntimeError(f"it finds {comm.size}, being of another MPI than mpirun")
    except (ImportError, RuntimeError) as error:  # the latter where there is no library of MPI
        if rank:
            sys.exit(2)  # process 0 says why
        raise RanksError(f"mpirun started {size} processes, which need mpi4py to work together "
                         f"({error}): pip install mpi4py mpich") from error
    ranks = Ranks(comm, comm.Split_type(MPI.COMM_TYPE_SHARED))
    _abort_on_errors(ranks)
    return ranks


def _abort_on_errors(ranks: Ranks) -> None:
    """An error that nobody handles ends the other processes too: they would wait for ever."""
    tell = sys.excepthook

    def hook(kind, error, trace):
        tell(kind, error, trace)
        ranks.abort(1, f"ended by {kind.__name__}")

    sys.excepthook = hook

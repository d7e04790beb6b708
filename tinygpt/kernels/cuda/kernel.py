"""CUDA C++ files as operations on tensors."""

import functools
from collections.abc import Callable
from pathlib import Path

from tinygrad import Tensor

from tinygpt.kernels.cpu.compile import program, with_includes
from tinygpt.kernels.cpu.kernel import Kernel, Sizes, Tensors

FOLDER = Path(__file__).parent


class CudaKernel(Kernel):
    """A CUDA C++ file, called as a C file is. Its sizes are constants in the code.

    grid is the number of blocks in two dimensions, threads those of a block.
    """

    missing = "float"
    last_arguments = ()

    def __init__(self, file: str, grid: tuple[int, int], threads: int, **defines: int | str):
        super().__init__(file, THREADS=threads, **defines)
        self.grid, self.threads = grid, threads

    def _program(self, outputs: Tensors, inputs: Tensors, sizes: Sizes, flops: int
                 ) -> tuple[str, Callable]:
        name, defines = self._declarations(outputs, inputs, sizes)
        name += "".join(f"_{size:g}" for size in sizes.values() if not isinstance(size, list))
        name = name.replace(".", "p").replace("-", "m").replace("+", "")
        code = source(self.file, name, defines)
        device = next(t for t in outputs.values() if isinstance(t, Tensor)).device
        count = sum(t is not None for t in outputs.values())
        launch = dict(global_size=(*self.grid, 1), local_size=(self.threads, 1, 1))
        return name, lambda *buffers: program(name, code, buffers, count, flops, device, **launch)

    def _tables(self, sizes: Sizes) -> list[Tensor]:
        return []

    def _declare_sizes(self, sizes: Sizes) -> list[str]:
        def declare(name: str, value) -> str:
            if isinstance(value, list):
                return f"const long {name}[] = {{{', '.join(map(str, value))}}};"
            return f"const {'float' if isinstance(value, float) else 'long'} {name} = {value!r};"
        return [declare(*size) for size in sizes.items()]


@functools.cache
def source(file: str, name: str, defines: tuple[tuple[str, str | int], ...]) -> str:
    """A CUDA C++ file with its includes and defines, of which NAME is one."""
    return with_includes(FOLDER, file, name, defines)

"""Mix whole kernels, then convolve every sample with its own by kernels in Triton: one launch a chunk of samples.

The kernels stay as the mixing product leaves them. Numbers of cells are filled up with zeros to a multiple of 8, since
products of the tensor cores are several times as slow on rows that do not start at 16 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine import mixing
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.orders import count
from kw_lightning.nn.engine.paths.path import Path
from kw_lightning.nn.engine.problem import Operands, Problem
from kw_lightning.nn.engine.tiles import launches
from kw_lightning.nn.engine.tiles.walks import DIMENSIONS
from kw_lightning.nn.engine.workspace import sample_chunks, scratch


class Triton(Path):
    """Kernels in Triton."""

    name = "mix_kernels/triton"
    multiple = 8
    fitted_gpu = Fitted(
        Units(0, 3e-15, 3.6e-13, 8.8e-06, 0.00028),
        Units(3.4e-15, 2.1e-15, 3.4e-13, 0.00012, 0),
    )

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can."""
        convolution = problem.convolution
        if convolution.groups > 1 and not launches.is_depthwise(convolution):
            return "its products take all input channels together or each by itself"
        if not 1 <= convolution.dimensions <= DIMENSIONS:
            return "it takes maps of one or two dimensions"
        whole = convolution.cell_shape[2:] == convolution.kernel_shape[2:]
        if not whole and math.prod(convolution.cell_shape[2:]) > 1:
            return "it takes cells of one kernel position or of all"
        if problem.device.type != launches.device_type():
            return "it is for GPUs"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return "it computes in float32, bfloat16 and float16"
        return launches.missing()

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass: kernels are written once and read once."""
        convolution, batch = problem.convolution, problem.batch
        sizes = math.prod(problem.size), math.prod(convolution.output_size(problem.size))
        counted = count("mix_kernels", convolution, problem.cells, *sizes)
        kernel, stored = math.prod(convolution.kernel_shape), problem.cells * math.prod(convolution.cell_shape)
        chunks = len(sample_chunks(batch, kernel * problem.dtype.itemsize, problem.device))
        maps = convolution.kernel_shape[1] * convolution.groups * sizes[0] + convolution.kernel_shape[0] * sizes[1]
        elements = (chunks + 4) * stored + batch * (2 * kernel + maps)
        return Load(batch * counted.mixing, batch * counted.products, elements, 4 + 2 * chunks)

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        work = _Work(operands)
        out = y.movedim(1, -1)
        rows = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        for samples in work.samples:
            launches.convolve(work.x[samples], work.mix(samples), rows[samples], operands.convolution)
        if rows is not out:
            out.copy_(rows)

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients; the kernels are mixed anew, chunk by chunk."""
        convolution = operands.convolution
        work = _Work(operands)
        rows = gradient.movedim(1, -1).contiguous()
        found = new_gradients(operands.x, work.attention, work.cells, needed)
        of_x = None if found.x is None else torch.empty_like(work.x)
        for samples in work.samples:
            if of_x is not None:
                launches.convolve_back(rows[samples], work.mix(samples), of_x[samples], convolution)
            if found.of_kernels:
                kernels = work.kernels(samples)
                launches.correlate(work.x[samples], rows[samples], kernels, convolution)
                work.mixture_gradients(samples, kernels, found)
        return Gradients(
            None if of_x is None else _in_format(of_x.movedim(-1, 1), operands.x),
            None if found.attention is None else found.attention[..., : len(operands.cells)],
            None if found.cells is None else work.as_cells(found.cells),
        )


def _in_format(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the input [batch, in_channels, *size], channels first if the input's are."""
    return gradient.contiguous() if x.is_contiguous() else gradient


class _Work:
    """The operands as the kernels take them, and the mixing products around.

    Attributes:
        x: [batch, *size, in_channels], contiguous.
        attention: α [batch, mixtures, cells], filled up.
        cells: E [cells, numbers of a cell], filled up.
        samples: the chunks of the batch.
    """

    def __init__(self, operands: Operands) -> None:
        wanted = len(operands.cells) + -len(operands.cells) % Triton.multiple
        fill = wanted - operands.attention.shape[-1]
        self.x = operands.x.movedim(1, -1).contiguous()
        self.attention = F.pad(operands.attention, (0, fill)) if fill else operands.attention
        self.cell = operands.cells.shape
        flat = operands.cells.flatten(3).movedim(3, 1).flatten(1)  # positions of a cell first
        fill = wanted - len(flat)
        self.cells = F.pad(flat, (0, 0, 0, fill)) if fill else flat
        self.size = self.attention.shape[1] * self.cells.shape[1]
        self.samples = sample_chunks(len(self.x), self.size * self.x.element_size(), self.x.device)
        self.buffer = scratch("kernels", [(self.samples[0].stop - self.samples[0].start) * self.size], self.x)

    def as_cells(self, gradient: Tensor) -> Tensor:
        """Return the gradient of `cells` as that of E [cells, co, ci, *ck]."""
        cells, co, ci, *size = self.cell
        return gradient[:cells].view(cells, -1, co, ci).movedim(1, 3).reshape(cells, co, ci, *size)

    def kernels(self, samples: slice) -> Tensor:
        """Return the buffer as [samples, numbers of a kernel]."""
        batch = samples.stop - samples.start
        return self.buffer[: batch * self.size].view(batch, self.size)

    def mix(self, samples: slice) -> Tensor:
        """Return the kernels of the samples, mixed."""
        kernels = self.kernels(samples)
        mixing.mix(self.attention[samples].flatten(0, 1), self.cells, kernels.view(-1, self.cells.shape[1]))
        return kernels

    def mixture_gradients(self, samples: slice, kernels: Tensor, found: Gradients) -> None:
        """Turn the gradient of the kernels into that of α and E."""
        attention = self.attention[samples].flatten(0, 1)
        flat = kernels.view(-1, self.cells.shape[1])
        if found.attention is not None:
            mixing.attention_gradient(flat, self.cells, found.attention[samples].flatten(0, 1))
        if found.cells is not None:
            mixing.cells_gradient(attention, flat, found.cells, first=samples.start == 0)

"""Gates: factors of a layer's input and output channels, anew for each sample.

They scale what goes into the layer and what comes out of it, so that no sample needs a kernel of its own for them.
As in ODConv (ICLR 2022), https://openreview.net/forum?id=DmpCfq6Mg39, and of the input in KernelDNA (2025),
https://arxiv.org/abs/2503.23379.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kw_lightning.errors import mistake
from kw_lightning.nn.precision import autocast_type, call_linear, in_type

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = get_args(Side)
HALF = 2.0  # what a kernel is multiplied by where a gate starts at σ(0) = 1/2


class Factors(NamedTuple):
    """What gates make of a batch; None where there is no gate.

    Attributes:
        input: [batch, in_channels].
        output: [batch, out_channels].
    """

    input: Tensor | None = None
    output: Tensor | None = None


OPEN = Factors()


class ChannelGates(nn.Module):
    """Gives factors from the attention's hidden layer: Linear(width → channels) = z, τ + (1 − τ)·σ(z / T).

    They are open, 1, where the attention starts (τ = 1); an attention without a start has σ(z / T) throughout. T is the
    softmax's temperature, 1 without one.

    Args:
        width: of the hidden layer.
        in_channels, out_channels: of the layer.
        sides: which of "input" and "output" have gates.
        annealed: whether the attention has a start.

    Raises:
        ValueError: no such side.
    """

    def __init__(
        self,
        width: int,
        in_channels: int,
        out_channels: int,
        sides: Collection[Side],
        *,
        annealed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for side in sides:
            if side not in SIDES:
                raise ValueError(mistake(side, SIDES, what="the unknown gate"))
        factory: Any = {"device": device, "dtype": dtype}
        self.annealed = annealed
        self.input = nn.Linear(width, in_channels, **factory) if "input" in sides else None
        self.output = nn.Linear(width, out_channels, **factory) if "output" in sides else None
        self.reset_parameters()

    @property
    def linears(self) -> list[nn.Linear]:
        """Return the linear layers of the gates that there are."""
        return [linear for linear in (self.input, self.output) if linear is not None]

    def reset_parameters(self) -> None:
        """Set the start values: Kaiming normal (fan out, ReLU) for weights, 0 for biases."""
        for linear in self.linears:
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def start_even(self) -> float:
        """Start every gate at 1/2 for all samples where τ = 0, and return by what a kernel then has to be multiplied.

        The weights are 0 and their input is not, so that they learn from the first step.
        """
        for linear in self.linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return HALF ** len(self.linears)

    def forward(self, hidden: Tensor, temperature: Tensor, softmax_temperature: Tensor | None = None) -> Factors:
        """Return the factors of a batch.

        Args:
            hidden: [batch, width], see `ContrastingAttention.hidden`.
            temperature, softmax_temperature: τ and T, scalar tensors; None for T means 1.
        """
        if autocast_type(hidden.device) is not None:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.forward(hidden, temperature, softmax_temperature)
        return Factors(
            *(
                None if linear is None else self._open(call_linear(hidden, linear), temperature, softmax_temperature)
                for linear in (self.input, self.output)
            )
        )

    def _open(self, z: Tensor, temperature: Tensor, softmax_temperature: Tensor | None) -> Tensor:
        factors = torch.sigmoid(z if softmax_temperature is None else z / in_type(softmax_temperature, z.dtype))
        return (
            torch.lerp(factors, torch.ones_like(factors), in_type(temperature, z.dtype)) if self.annealed else factors
        )

    def extra_repr(self) -> str:
        return "" if self.annealed else "annealed=False"


__all__ = ["OPEN", "SIDES", "ChannelGates", "Factors", "Side"]

"""What a recipe may ask for at most, so that a stranger's recipe cannot take the machine while it is only looked at.

All of it is checked before anything of that size is made: a plan takes under a second and 500 MB, or is refused.
The limits are far above any network that one would train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from kw_lightning.errors import RecipeError, sentence

MAX_ARGUMENT = 100_000
"""Largest whole number, and longest string, among a backbone's arguments."""
MAX_PARAMETERS = 10_000_000_000
"""Most parameters of a network, static or dynamic."""
MAX_MODULES = 4_000
"""Most modules of a network."""
MAX_MIXTURES = 200_000
"""Most mixtures of all warehouses together."""
MAX_INPUT = 1 << 28
"""Most numbers in one input sample."""


class TooLargeError(RecipeError):
    """A network past these limits."""


def excessive_arguments(value: object, path: str = "model.args") -> Iterator[tuple[str, str]]:
    """Yield (key path, message) for every number past `MAX_ARGUMENT` among a backbone's arguments, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from excessive_arguments(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from excessive_arguments(item, f"{path}[{index}]")
    elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:
        yield path, sentence(f"{value:.4g}", f"at most {MAX_ARGUMENT:,}")
    elif isinstance(value, str) and len(value) > MAX_ARGUMENT:
        yield path, sentence(f"{len(value):,} characters", f"at most {MAX_ARGUMENT:,}")


@contextmanager
def bounded_construction(what: str) -> Iterator[None]:
    """Count the parameters and modules of networks made meanwhile, and stop when they pass the limits.

    Raises:
        TooLargeError: more than `MAX_PARAMETERS` or `MAX_MODULES`.
    """
    parameters = modules = 0

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters
        if parameter is not None and not is_lazy(parameter):
            parameters += parameter.numel()
        if parameters > MAX_PARAMETERS:
            raise TooLargeError(
                f"{what} has more than {MAX_PARAMETERS:,} parameters, which is the most a recipe may ask for"
            )

    def on_module(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            most = f"{MAX_MODULES:,} modules, which is the most a recipe may ask for"
            raise TooLargeError(f"{what} has more than {most}")

    handles = [
        torch_module.register_module_parameter_registration_hook(on_parameter),
        torch_module.register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

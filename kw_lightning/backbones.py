"""Networks by name: `torchvision/NAME`, `timm/NAME`, `python:package.module:callable`.

Args are the constructor's own keyword arguments. One is added here: torchvision's ResNets take
`stochastic_depth_prob`, as its ConvNeXt and EfficientNet do: the share of samples for which a block's branch is left
out in training. In a ResNet it is the same in every block, as in the published training of KernelWarehouse.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from kw_lightning.errors import Problem, RecipeError, argument, did_you_mean, first_line, mistake, needs
from kw_lightning.limits import TooLargeError, bounded_construction, excessive_arguments
from kw_lightning.pretrained import load_pretrained
from kw_lightning.recipe.types import Recipe

Builder = Callable[..., nn.Module]
# Arguments by which constructors fetch weights: `model.pretrained` is for that, and a plan fetches nothing.
FETCHING = {"weights", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
FRAMES = 16  # of a clip, as torchvision's video networks were trained with
FLOW = (520, 960)  # images between which torchvision's networks of optical flow were trained to see motion
FORMS = "torchvision/NAME, timm/NAME or python:package.module:callable"


def create(recipe: Recipe, *, allow_python: Sequence[str] = (), device: torch.device | str | None = None) -> nn.Module:
    """Make the static network that a recipe names, with its pretrained weights.

    Args:
        recipe: its `model.backbone`, `model.args` and `model.pretrained` are used.
        allow_python: packages whose code `python:` names may import and run.
        device: where to make it; on "meta" no weights are made or fetched.

    Raises:
        RecipeError: no such network; a `python:` package that is not allowed; arguments that the constructor refuses
            or that are past `kw_lightning.limits`; **or** weights that do not fit.
        RunError: weights that cannot be read or fetched.
    """
    model = recipe.model
    if model is None or model.backbone is None:
        raise RecipeError(recipe.document.problem("model", f"a recipe needs a network here: model.backbone: {FORMS}"))
    excessive = list(excessive_arguments(model.args))
    if excessive:
        raise TooLargeError([recipe.document.problem(path, message) for path, message in excessive])
    fetching = [key for key in model.args if key in FETCHING]
    if fetching:
        message = "weights are asked for by model.pretrained, not by an argument of the constructor"
        raise RecipeError([recipe.document.problem(f"model.args.{key}", message) for key in fetching])
    if model.args.get("num_classes") == "auto":
        message = (
            "auto is the number of classes of the data, which kw-fit and kw plan look up; here it has to be a number"
        )
        raise RecipeError(recipe.document.problem("model.args.num_classes", message))
    at_backbone = partial(recipe.document.problem, "model.backbone")
    name, args = model.backbone, dict(model.args)
    on_meta = device is not None and torch.device(device).type == "meta"
    pretrained = False if on_meta else model.pretrained
    library, _, rest = name.partition("/")
    if name.startswith("python:"):
        builder = _checked(import_callable(name, allow_python, at_backbone), name)
    elif library == "torchvision" and rest:
        builder = _torchvision(rest, args, on_meta, at_backbone)
    elif library == "timm" and rest:
        builder = _timm(rest, at_backbone)
    else:
        raise RecipeError(at_backbone(mistake(name, FORMS)))
    try:
        network = _construct(partial(builder, **args), f'the network "{name}"', device, on_meta)
    except TooLargeError as error:
        raise TooLargeError(at_backbone(str(error))) from None
    except Exception as error:  # whatever a constructor makes of a stranger's arguments
        raise RecipeError(recipe.document.problem("model.args", _refused(name, builder, args, error))) from error
    if pretrained:
        load_pretrained(recipe, network)
    return network


def input_shape(recipe: Recipe, network: nn.Module) -> tuple[int, ...] | None:
    """Return [channels, *size] of one sample: the recipe's, else the usual one of the network, else None."""
    model = recipe.model
    if model is None:
        return None
    if model.input is not None:
        return model.input
    channels, *size = _usual_input(model.backbone or "", network) or (3,)
    # Vision transformers are made for one size, whatever their weights were trained with.
    asked = model.args.get("img_size", getattr(network, "image_size", None))
    if asked is not None:
        size = list(asked) if isinstance(asked, list | tuple) else [asked] * 2
    return (model.args.get("in_chans", channels), *size) if size else None


def _construct(builder: Builder, what: str, device: torch.device | str | None, on_meta: bool) -> nn.Module:
    with bounded_construction(what):
        if not on_meta:
            with torch.device(device) if device is not None else nullcontext():
                return builder()
        try:
            with torch.device("meta"):
                return builder()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
        # Some constructors compute with small tensors (RegNet its widths), which have no values on the meta device.
        with _parameters_on_meta():
            return builder()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module registers it, before it gets its start values."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or is_lazy(parameter):
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = torch_module.register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _torchvision(name: str, args: dict[str, Any], on_meta: bool, problem: Callable[[str], Problem]) -> Builder:
    import torchvision

    names = torchvision.models.list_models()
    if name not in names:
        allowed = "the names of torchvision.models.list_models()"
        raise RecipeError(problem(mistake(name, allowed, what="the unknown network", names=names)))
    builder: Builder = torchvision.models.get_model_builder(name)
    # A detector's constructor fetches its backbone's weights unless told otherwise.
    if "weights_backbone" in inspect.signature(builder).parameters and (on_meta or "weights_backbone" not in args):
        args["weights_backbone"] = None
    if inspect.getmodule(inspect.unwrap(builder)) is torchvision.models.resnet and "stochastic_depth_prob" in args:
        return partial(_resnet_with_stochastic_depth, builder)
    return builder


def _timm(name: str, problem: Callable[[str], Problem]) -> Builder:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(problem(needs(f'"timm/{name}"', "timm", "timm", error))) from None
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        raise RecipeError(
            problem(mistake(name, "the names of timm.list_models()", what="the unknown network", hint=hint))
        )
    tags = [known.partition(".")[2] for known in timm.models.get_arch_pretrained_cfgs(base)]
    if tag and tag not in tags:
        allowed = [each for each in tags if each] or "none"
        raise RecipeError(problem(mistake(tag, allowed, what=f"the unknown weights of timm/{base}", names=tags)))
    return partial(timm.create_model, name)


def import_callable(name: str, allow_python: Sequence[str], problem: Callable[[str], Problem]) -> Callable[..., Any]:
    """Import what `python:package.module:callable` names.

    Args:
        name: the name, from a recipe.
        allow_python: packages whose code such names may import and run.
        problem: makes a placed problem of a message.

    Raises:
        RecipeError: no such name, a package that is not allowed, **or** a thing that is not callable.
    """
    module_name, _, attribute = name.removeprefix("python:").partition(":")
    if not module_name or not attribute:
        raise RecipeError(problem(mistake(name, "python:package.module:callable")))
    package = module_name.partition(".")[0]
    if not any(module_name == allowed or module_name.startswith(f"{allowed}.") for allowed in allow_python):
        raise RecipeError(
            problem(
                f'"{name}" would run code of the package "{package}"; allow it by {argument("allow_python", [package])}'
            )
        )
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise RecipeError(problem(f'"{name}" cannot be imported: {first_line(error)}')) from error
    if not callable(target):
        raise RecipeError(problem(f'"{name}" is no callable but a {type(target).__name__}'))
    function: Callable[..., Any] = target
    return function


def _checked(target: Callable[..., object], name: str) -> Builder:
    def build(**args: Any) -> nn.Module:
        network = target(**args)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it returned a {type(network).__name__}, and no torch.nn.Module")
        return network

    build.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
    return build


def _refused(name: str, builder: Builder, args: Mapping[str, Any], error: Exception) -> str:
    hint = ""
    try:
        parameters = inspect.signature(builder).parameters
        known = [key for key in parameters if key not in {*FETCHING, "progress", "kwargs"}] + ["num_classes"]
        unknown = [key for key in args if key not in known]
        hint = next((f"; {hint}" for hint in (did_you_mean(key, known) for key in unknown) if hint), "")
    except (TypeError, ValueError):
        pass
    given = ", ".join(f"{key}={value!r}"[:80] for key, value in args.items())
    return f'"{name}" does not take these arguments ({given}): {first_line(error)}{hint}'


def _usual_input(backbone: str, network: nn.Module) -> tuple[int, ...] | None:
    """Return [channels, *size] that a network was made for: timm says it, and the weights of torchvision's."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        return tuple(config["input_size"])
    if not backbone.startswith("torchvision/"):
        return None
    weights = _torchvision_weights(backbone.partition("/")[2])
    transforms = weights.transforms() if weights is not None else None
    crop = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)  # segmentation: resized
    if crop:
        size = [crop] * 2 if isinstance(crop, int) else [*crop] * 2 if len(crop) == 1 else [*crop]
        video = weights.__class__.__module__.startswith("torchvision.models.video")
        return (3, *((FRAMES,) if video else ()), *size)
    resized: Any = getattr(network, "transform", None)  # a detector scales its images itself
    if resized is not None and getattr(resized, "min_size", None):
        return (3, *(resized.fixed_size or [resized.min_size[-1]] * 2))
    if backbone.startswith("torchvision/raft"):
        return (3, *FLOW)
    return None


def _torchvision_weights(name: str) -> Any:
    import torchvision

    try:
        return torchvision.models.get_model_weights(name)["DEFAULT"]
    except (ValueError, KeyError):
        return None


def _resnet_with_stochastic_depth(builder: Builder, *, stochastic_depth_prob: float, **args: Any) -> nn.Module:
    """Make a torchvision ResNet that leaves branches out in training; its names and parameters stay as they are."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    if not 0 <= stochastic_depth_prob < 1:
        raise ValueError(mistake(stochastic_depth_prob, "0 ≤ p < 1", what="stochastic_depth_prob"))
    network = builder(**args)
    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last.register_forward_hook(partial(_leave_out, stochastic_depth_prob))
    return network


def _leave_out(probability: float, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    from torchvision.ops import stochastic_depth

    return stochastic_depth(output, probability, "row", module.training)

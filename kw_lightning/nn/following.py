"""Following a module's forward pass by torch.fx, and putting one step in place of a layer and of what comes after it.

A module is followed by itself, those within are calls; of sequences it calls, their parts. What torch.fx would record
wrongly is not followed: a forward pass that sets attributes, makes tensors, asks for types, or changes precision.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from kw_lightning.nn.engine.epilogue import ACTIVATIONS
from kw_lightning.nn.precision import is_unheard
from kw_lightning.nn.steps import DIMENSIONS, DYNAMIC, NAMES, STATIC, activation_within, is_norm, run

FUNCTIONS = {function: name for name, function in ACTIVATIONS.items()} | {torch.relu: "relu", torch.relu_: "relu"}
METHODS = {"relu": "relu", "relu_": "relu"}
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

_one_at_a_time = threading.Lock()  # while torch.fx follows, every module of the process is called through it


def follow(module: nn.Module) -> tuple[Callable[..., Any] | None, set[int]]:
    """Return a forward pass in which layers do what comes after them, None if there is none such, and these layers."""
    stand_in = copy.copy(module)  # takes what the forward pass sets
    state = vars(stand_in)
    stores = [name for name, value in state.items() if type(value) in (list, dict, set) and not name.startswith("_")]
    state.update({name: copy.copy(state[name]) for name in stores}, training=False)
    state.pop("forward", None)
    before = _identities(state, stores)
    try:
        with _one_at_a_time:
            graph = _Tracer().trace(stand_in)
        if _identities(state, stores) != before:
            return None, set()
        nodes = list(graph.nodes)
        layers = {id(stand_in.get_submodule(str(node.target))) for node in nodes if _finish(graph, node, stand_in)}
        return (_bind(graph, module) if layers else None), layers
    except Exception:  # a stranger's forward pass, which torch.fx does not follow
        return None, set()


def calls_layers(module: nn.Module) -> bool:
    """Return whether a module may call a layer itself, and takes inputs."""
    children = list(_children(module))
    if not any(isinstance(child, (*DYNAMIC, *STATIC)) for child in children) or len(children) < 2:
        return False
    return bool(inputs_of(module))


def inputs_of(module: nn.Module) -> list[str]:
    """Return the names of the inputs that a forward pass must be given; its others are as they are by default."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # no function of Python's
        return []
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty]


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for parent in (module, *sequences(module)):
        yield from parent.children()


def sequences(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the sequences in a module, and in those again."""
    for child in module.children():
        if _is_sequence(child):
            yield child
            yield from sequences(child)


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and is_unheard(module)


class _Watched(fx.Proxy):
    """Stands for a tensor, and would not be known as one: a forward pass that asks for its type is not followed."""

    tracer: fx.Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Watched
        raise TraceError("the type of a tensor is asked for")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Return a method that records a change in place as such; torch.fx would take it for a new tensor."""
    function = getattr(operator, name)
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Watched, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in inputs_of(self.root)]
        return root_fn, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_sequence(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Watched(node, self)

    def create_node(self, *arguments: Any, **named: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TraceError("autocast is changed within")
        return super().create_node(*arguments, **named)

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, fx.Proxy) and isinstance(a, Tensor) and not self._is_held(a):
            raise TraceError("a tensor is made within, which may be another one every time")
        return super().create_arg(a)

    def _is_held(self, tensor: Tensor) -> bool:
        return any(tensor is one for one in (*self.root.parameters(), *self.root.buffers()))


def _modes() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _bind(graph: fx.Graph, module: nn.Module) -> Callable[..., Any]:
    """Return a graph as a function; what it takes of the module but tensors is looked up once, which is slow."""
    bound = SimpleNamespace()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            found = operator.attrgetter(str(node.target))(module)
            if not isinstance(found, nn.Module):
                raise TraceError("a tensor of the module is taken, which may be replaced")
            node.target = f"module_{id(found)}"
            setattr(bound, node.target, found)
    return MethodType(type(fx.GraphModule(vars(bound), graph)).forward, bound)


def _identities(state: dict[str, Any], stores: list[str]) -> dict[str, Any]:
    """Return which objects a module holds, and how many are in those of its attributes that may be added to."""
    return {name: (id(value), len(value) if name in stores else 0) for name, value in state.items()}


def _finish(graph: fx.Graph, layer: fx.Node, root: nn.Module) -> bool:
    """Put one call in the place of a layer's and of what comes after it; return whether there was anything."""
    called = _called(layer, root)
    if not isinstance(called, (*DYNAMIC, *STATIC)) or len(layer.args) != 1 or layer.kwargs:
        return False
    chain, place, norm, added, in_place, activation = [layer], layer, None, None, False, None
    user = _follower(chain, root)
    if user is not None and is_norm(_called(user, root)):
        norm = user
        chain.append(user)
        user = _follower(chain, root) if activation_within(_called(user, root)) is None else None
    if norm is None and isinstance(called, STATIC):
        return False
    if user is not None and (other := _summand(user, chain[-1])) is not None and _are_pure(layer, user, chain, root):
        place, added, in_place = user, other, user.target in (operator.iadd, "add_")
        chain.append(user)
        user = _follower(chain, root)
    if user is not None and (activation := _activation(user, root)) is not None:
        chain.append(user)
    elif norm is None and added is None:
        return False
    with graph.inserting_before(place):
        modules = [None if node is None else graph.get_attr(str(node.target)) for node in (layer, norm)]
        if isinstance(activation, fx.Node):
            activation = graph.get_attr(str(activation.target))
        step = graph.call_function(run, (*modules, layer.args[0], added, in_place, activation))
    chain[-1].replace_all_uses_with(step)
    for node in reversed(chain):
        graph.erase_node(node)
    return True


def _called(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _follower(chain: list[fx.Node], root: nn.Module) -> fx.Node | None:
    """Return the only call that sees what the last of a chain gives; modules that change nothing join the chain."""
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        called = _called(user, root)
        if type(called) is not nn.Identity or not is_unheard(called):
            return user if called is None or (user.args == (chain[-1],) and not user.kwargs) else None
        chain.append(user)
    return None


def _summand(user: fx.Node, last: fx.Node) -> fx.Node | None:
    """Return what is added to the last of a chain, None where `user` is no sum, or changes the other in place."""
    sums = (operator.add, operator.iadd, torch.add) if user.op == "call_function" else ("add", "add_")
    if user.op not in ("call_function", "call_method") or user.target not in sums or len(user.args) != 2 or user.kwargs:
        return None
    first, second = user.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first is last:
        return second
    return None if user.target in (operator.iadd, "add_") else first


def _are_pure(layer: fx.Node, last: fx.Node, chain: list[fx.Node], root: nn.Module) -> bool:
    """Return whether nothing between a layer and a sum, which happen at once then, may write into a tensor."""
    node = layer.next
    while node is not last:
        called = _called(node, root)
        pure = isinstance(called, (*DYNAMIC, *STATIC, *POOLS, *DIMENSIONS)) or node.target is run
        if not (pure or node.op == "get_attr" or node in chain):
            return False
        node = node.next
    return True


def _activation(user: fx.Node, root: nn.Module) -> str | fx.Node | None:
    """Return the name of an activation, **or** the node that calls one's module; None where `user` is neither."""
    if user.op == "call_module":
        return user if type(root.get_submodule(str(user.target))) in NAMES else None
    inputs = [each for each in (*user.args, *user.kwargs.values()) if isinstance(each, fx.Node)]
    known: Any = {"call_function": FUNCTIONS, "call_method": METHODS}.get(user.op, {})
    name: str | None = known.get(user.target) if inputs == [*user.args[:1]] else None
    return name

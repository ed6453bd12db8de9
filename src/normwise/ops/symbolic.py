"""Symbolic tracing by torch.fx: every layer, and every function of `normwise.functional`, is one node of the graph.

torch.fx records what is done to Proxies in the place of tensors. A norm branches on shapes, dtypes and devices, and
a Proxy has none. That is why torch.fx does not look inside torch.nn's layers, which it knows by the name of
their Python module alone; ours record themselves. It holds for any tracer, whatever it takes for a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy


def is_traced(*arguments: Any) -> bool:
    """Whether any of these, or what a tuple or list of them holds, is a Proxy of torch.fx."""
    return _proxy(arguments) is not None


def call_layer(layer: nn.Module, *args: Any, function: bool = False, **kwargs: Any) -> Any:
    """The node of this call of `layer`, some of whose arguments are Proxies; keyword arguments that are None are left
    out. None if `layer` has no name in the graph and `function` can stand for it there.

    Raises:
        TypeError: the layer is what is traced, not a part of it.
        RuntimeError: hooks, or a forward of the instance's own, which would run on Proxies now and again on tensors.
    """
    proxy = _proxy((*args, *kwargs.values()))
    assert proxy is not None
    path = _path(layer, proxy, function)
    return None if path is None else proxy.tracer.create_proxy("call_module", path, args, _given(kwargs))


def call_method(layer: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """The node of this call of a `method` of `layer`, some of whose arguments are Proxies; keyword arguments that are
    None are left out. Raises what `call_layer` does."""
    proxy = _proxy((*args, *kwargs.values()))
    assert proxy is not None
    owner = proxy.tracer.create_proxy("get_attr", str(_path(layer, proxy, False)), (), {})
    return proxy.tracer.create_proxy("call_method", method, (owner, *args), _given(kwargs))


def _path(layer: nn.Module, proxy: Proxy, optional: bool) -> str | None:
    """The name of `layer` in what is traced; None where it has none and that is `optional`."""
    path_of = getattr(proxy.tracer, "path_of_module", None)
    path = path_of(layer) if path_of is not None else ""
    name = type(layer).__name__
    if not path:
        if optional:
            return None
        raise TypeError(
            f"torch.fx looks inside the module that it is given, and cannot inside {name}: trace a model of which the "
            "layer is a part, e.g. torch.nn.Sequential(layer)"
        )
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise RuntimeError(
            f"{path} ({name}) has forward hooks, or a forward of its own, which would run while torch.fx traces and "
            "once more when the graph runs: remove them first, or use a Tracer whose is_leaf_module is true of this "
            "layer"
        )
    return str(path)


def call_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The node of this call of `function`, some of whose arguments are Proxies; keyword arguments that are None are
    left out."""
    proxy = _proxy((*args, *kwargs.values()))
    assert proxy is not None
    return proxy.tracer.create_proxy("call_function", function, args, _given(kwargs), name=function.__name__)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _proxy(arguments: tuple[Any, ...]) -> Proxy | None:
    for argument in arguments:
        if argument is None or type(argument) is Tensor:
            continue
        if isinstance(argument, Proxy):
            return argument
        if isinstance(argument, (tuple, list)) and (found := _proxy(tuple(argument))) is not None:
            return found
    return None

"""What a model does with its tensors in one call: which function made each of them of which others.

Where torch.fx asks that a forward can be followed without numbers, this looks on while it runs, so any forward will do;
but only the way that this one call takes is seen.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from normwise.measure.snapshot import modes_kept
from normwise.surgery.batches import call_example, without_graph
from normwise.surgery.operations import ADDS, CONVOLUTIONS, FACTORS, JOINS, LIKE, MOVES, NEW, QUERIES

Value: TypeAlias = int  # the number of a tensor, a new one after each change in place


@dataclass
class Step:
    """One call of a function or of a norm.

    passes: the inputs that the results are a sum of, value by value: a sum, dropout in evaluation, a reshape. What adds
        a multiple of the same vector of ones over the features to them, adds one to the results.
    moves: nothing is added, multiplied or left out on the way.
    absorbs: it is a layer norm over the features, to which such an addition makes no difference.
    obstacle: why the results are not of mean zero over the features where what `passes` is.
    product: of a linear layer, a convolution or an addmm.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    passes: list[Value]
    moves: bool = False
    obstacle: str = ""
    absorbs: bool = False
    dropout: float = 0.0
    product: Product | None = None
    norm: nn.Module | None = None


class Product(NamedTuple):
    """W x + b: the values of x, W and b, and which axis of W is that of the outputs."""

    x: Value
    weight: Value
    bias: Value | None
    axis: int


class Observed(TorchFunctionMode):
    """The steps of one call of a model, in their order.

    Attributes:
        steps: what was called.
        tensors: by value, a parameter or buffer of the model.
        outputs: the values of the tensors that the model returned.
    """

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module], example: Any) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.tensors: dict[Value, Tensor] = {}
        self._numbers = itertools.count()
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # whose ids stay theirs
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._inside = 0
        with ExitStack() as hooks, modes_kept(model.modules()), without_graph(model):
            for norm in norms:
                hooks.callback(norm.register_forward_pre_hook(self._enter, prepend=True).remove)
                hooks.callback(norm.register_forward_hook(self._leave, with_kwargs=True).remove)
            for module in model.modules():
                module.training = False
            with self:
                result = call_example(model, example)
        self.outputs = [self._value(t) for t in tensors_in(result)]
        self._kept.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        given = [self._value(t) for t in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        if given:
            self._note(func, args, kwargs, given, result)
        return result

    def _enter(self, norm: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, norm: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self._inside -= 1
        given = [self._value(t) for t in tensors_in((args, kwargs))]
        self.steps.append(Step("norm", given, self._fresh(result), [], norm=norm))

    def _value(self, tensor: Tensor) -> Value:
        """Its number; one for a tensor that nothing was seen to make."""
        if id(tensor) not in self._values:
            self._fresh(tensor)
            if id(tensor) in self._own:
                self.tensors[self._values[id(tensor)]] = tensor
        return self._values[id(tensor)]

    def _fresh(self, result: Any) -> list[Value]:
        found = []
        for tensor in tensors_in(result):
            self._kept.append(tensor)
            self._values[id(tensor)] = next(self._numbers)
            found.append(self._values[id(tensor)])
        return found

    def _note(self, func: Any, args: Any, kwargs: Any, given: list[Value], result: Any) -> None:
        name = getattr(func, "__name__", str(func))
        getter = name == "__get__"
        name = func.__self__.__name__ if getter else name
        outputs = list(tensors_in(result))
        if (not outputs and getter) or name in QUERIES:
            return
        if func is F.multi_head_attention_forward:
            self._attention(args, kwargs, result)
            return
        step = self._classified(name, args, kwargs, given, outputs)
        changed = self._changed(name, args, kwargs)
        step.outputs = self._fresh(outputs)
        step.outputs += self._fresh([t for t in changed if all(t is not other for other in outputs)])
        self.steps.append(step)

    @staticmethod
    def _changed(name: str, args: Any, kwargs: Any) -> list[Tensor]:
        """What a function changes in place."""
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        return [*(t for t in args[:1] if in_place and isinstance(t, Tensor)), *tensors_in(kwargs.get("out"))]

    def _classified(self, name: str, args: Any, kwargs: Any, given: list[Value], outputs: list[Tensor]) -> Step:
        step = Step(name, given, [], [])
        tensors = list(tensors_in((args, kwargs)))
        if "out" in kwargs:
            return step
        if name in NEW or name.startswith("new_"):
            return Step(name, [], [], [])
        if name in LIKE:
            return Step(name, given[:1], [], given[:1], moves=True)
        if name == "embedding":
            bound = _bound(F.embedding, args, kwargs)
            if bound["max_norm"] is None:
                step.passes, step.moves = [self._value(bound["weight"])], True
        elif name in MOVES:
            step.passes, step.moves = given[:1], True
        elif name in JOINS:
            step.passes = given
        elif name in ADDS:
            step.passes = given
            if any(isinstance(a, (int, float)) and a for a in args):
                step.obstacle = "a number is added to the stream"
        elif name in FACTORS:
            step.passes = self._scaled(name, tensors, given, outputs)
            if not step.passes:
                step.obstacle = "its stream, or a branch of it, is multiplied by another tensor (LayerScale, a gate)"
        elif name == "dropout":
            bound = _bound(F.dropout, args, kwargs)
            if not bound["training"] or not bound["p"]:
                step.passes, step.dropout, step.moves = given[:1], float(bound["p"]), not bound["p"]
        elif name == "layer_norm":
            step.absorbs = len(_bound(F.layer_norm, args, kwargs)["normalized_shape"]) == 1
        elif name in ("masked_fill", "masked_fill_") and len(args) == 3 and args[2] == 0 and args[1].shape[-1:] == (1,):
            step.passes = given[:1]
        elif name == "linear" or name in CONVOLUTIONS:
            x, weight, bias = (
                args[n] if len(args) > n else kwargs.get(key) for n, key in enumerate(("input", "weight", "bias"))
            )
            step.product = self._product(x, weight, bias, 0)
        elif name == "addmm" and len(args) == 3 and not kwargs:
            step.product = self._product(args[1], args[2], args[0], 1)
        return step

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Product:
        return Product(self._value(x), self._value(weight), None if bias is None else self._value(bias), axis)

    @staticmethod
    def _scaled(name: str, tensors: list[Tensor], given: list[Value], outputs: list[Tensor]) -> list[Value]:
        """What is multiplied, if by a number or by one for all features."""
        if len(given) == 1:
            return given
        if len(given) == 2:
            per_row = [t.dim() == 0 or (t.shape[-1] == 1 and outputs[0].shape[-1] > 1) for t in tensors]
            if per_row[1]:
                return given[:1]
            if per_row[0] and "div" not in name:
                return given[1:]
        return []

    def _attention(self, args: Any, kwargs: Any, result: Any) -> None:
        """Two products with the attention itself between them."""
        bound = _bound(F.multi_head_attention_forward, args, kwargs)
        query, key, value = (bound.pop(name) for name in ("query", "key", "value"))
        weights = [bound.pop(name) for name in ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")]
        rest = [self._value(t) for t in tensors_in(bound)]
        if query is key is value and weights[0] is not None:
            product = self._product(query, weights[0], weights[1], 0)
            inputs = [self._value(t) for t in tensors_in((query, weights[:2]))]
            rest.append(next(self._numbers))
            self.steps.append(Step("linear", inputs, rest[-1:], [], product=product))
        else:
            rest += [self._value(t) for t in tensors_in((query, key, value, weights[:2]))]
        attended = next(self._numbers)
        self.steps.append(Step("attention", rest, [attended, *self._fresh(result[1:])], []))
        bias = None if weights[3] is None else self._value(weights[3])
        product = Product(attended, self._value(weights[2]), bias, 0)
        inputs = [attended, product.weight, *([] if bias is None else [bias])]
        self.steps.append(Step("linear", inputs, self._fresh(result[0]), [], product=product))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in what is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list, set)):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)

"""Hooks on every layer of a model, and what they gather over its passes in train mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from normwise.diagnosis.attention import AttentionWatch
from normwise.diagnosis.batches import Batch, Loss, scalar
from normwise.diagnosis.cells import CellWatch
from normwise.diagnosis.distributions import PART, PARTS, SMALL_PART, Layout, Watched
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import Layouts, Named, layers_of, own_parameters, tensors_in
from normwise.diagnosis.modes import count_nonfinite
from normwise.diagnosis.norms import NormWatch
from normwise.diagnosis.padding import Valid, counted, is_mask, valid_positions
from normwise.diagnosis.records import NonFinite
from normwise.diagnosis.recurrent import RecurrentWatch
from normwise.diagnosis.streams import StreamWatch
from normwise.diagnosis.trail import Trail
from normwise.measure.gradients import squared_norm
from normwise.measure.saturation import Saturation, is_saturated, nonlinearity_of
from normwise.ops._torch_internals import transforms_active


class Seen:
    """One layer over all batches."""

    def __init__(self, named: Named, was_training: bool, lean: bool) -> None:
        self.name, self.module, self.role = named
        self.order: int | None = None
        self.calls = self.most_calls = 0
        settings = (SMALL_PART, PARTS) if lean else (PART, None)
        self.input, self.output = Watched(*settings), Watched(*settings)
        self.nonlinearity = nonlinearity_of(self.module)
        self.saturation = Saturation()
        self.norm = NormWatch(self.module, was_training) if self.role == "norm" else None
        self.recurrent: RecurrentWatch | CellWatch | None = None
        if isinstance(self.module, RNNBase):
            self.recurrent = RecurrentWatch(self.module)
        elif isinstance(self.module, RNNCellBase):
            self.recurrent = CellWatch(self.module)
        self.output_gradient: list[float] = []
        self.weight_gradients: dict[str, list[float]] = {}
        self.bias_sum: Tensor | None = None
        self.bias_size: Tensor | None = None
        # The output of the first and the input of the last call of a pass: see `inside_recurrence`.
        self.first_output: Tensor | None = None
        self.last_input: Tensor | None = None
        self.squares = 0.0  # of the gradients that arrive in the present pass
        self.arrived = False
        self.spoilt_input = False  # NaN or infinity in the input of the present call


class Produced(NamedTuple):
    """An output of a layer with a bias, as it was when it came out."""

    tensor: Tensor
    layer: str
    version: int


class Watch:
    """Gathers while open, `with Watch(model, modes) as watch: watch.train_pass(batch, loss)`; no hook stays behind."""

    def __init__(
        self,
        model: nn.Module,
        was_training: dict[str, bool],
        *,
        lean: bool = False,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`lean`: outputs as a whole, units, norms and gates alone, which is what a training step can spare.
        `scale`: the factor that the loss is multiplied by on the way back, in mixed precision."""
        self.model, self.lean, self.scale, self.modes = model, lean, scale, was_training
        self.layers = {named.name: Seen(named, was_training[named.name], lean) for named in layers_of(model)}
        self.handles: list[Any] = []
        self.recording = self.backward = False
        self.produced: dict[int, Produced] = {}
        self.layouts = Layouts(1)
        self.samples = 1
        self.valid: Valid | None = None
        self.next = 0
        self.unseen: dict[str, None] = {}  # layers that run inside torch.func's transforms, in their order
        self.nonfinite = NonFinite()
        self.forward_trail, self.backward_trail = Trail(), Trail()
        self.inside: list[str] = []  # the modules that are running, the innermost last
        self.attention = AttentionWatch(lambda: self.inside[-1] if self.inside else "")
        self.streams = StreamWatch(model, self._counts)

    def __enter__(self) -> Watch:
        if not self.lean:
            self._follow_modules()
            self.handles += self.streams.handles()
        for seen in self.layers.values():
            before = functools.partial(self._before, seen)
            after = functools.partial(self._after, seen)
            self.handles.append(seen.module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(seen.module.register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def train_pass(self, batch: Batch, loss: Loss | None) -> tuple[Any, float, dict[str, Tensor]]:
        """One batch forward and backward: (output, loss, gradient of each parameter by name). `grad` is left alone.

        Raises:
            DiagnosisError: from whatever the model or the loss raises.
        """
        self.begin(batch.samples, valid_positions(batch, self.model))
        self.recording = True
        try:
            with self.attention:
                output = batch.call(self.model)
        finally:
            self.recording = False
        value = scalar(loss, output, batch)
        self._find_recurrences()
        gradients = self._gradients(value)
        self.end(gradients)
        return output, float(value.detach()), gradients

    def count_nonfinite(self, batch: Batch, output: Any, loss: float, gradients: dict[str, Tensor]) -> None:
        """What of a pass is NaN or infinite."""
        before = self.nonfinite
        # A mask that is added to scores may well be -inf.
        inputs = [t for name, t in batch.tensors(self.model).items() if not is_mask(name, t)]
        spoiled = [name for name, g in gradients.items() if not bool(torch.isfinite(g).all())]
        outputs = count_nonfinite(output)
        # Scores that are masked by -inf come to nothing: only what reaches the end counts.
        counts = bool(outputs or spoiled or not math.isfinite(loss))
        of_batch = count_nonfinite(inputs)
        self.nonfinite = NonFinite(
            before.inputs + of_batch,
            before.outputs + outputs,
            before.losses + (not math.isfinite(loss)),
            list(dict.fromkeys([*before.gradients, *spoiled])),
            first=before.first or (self.forward_trail.first if counts else None),
            first_gradient=before.first_gradient or (self.backward_trail.first if spoiled else None),
            batches=[*before.batches, *([batch.index] if of_batch else [])],
        )

    def begin(self, samples: int, valid: Valid | None) -> None:
        """Before a pass, of a batch of so many samples (0: unknown)."""
        self.samples, self.valid = samples, valid
        self.layouts.samples = samples
        self.produced.clear()
        self.inside.clear()
        self.forward_trail, self.backward_trail = Trail(), Trail()
        self.streams.begin()
        for seen in self.layers.values():
            seen.calls, seen.squares, seen.arrived = 0, 0.0, False

    def _gradients(self, value: Tensor) -> dict[str, Tensor]:
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not wanted or not value.requires_grad:
            if wanted:
                raise DiagnosisError(
                    "loss does not depend on the model's parameters: it returned a tensor without a gradient. Leave "
                    "out .detach() and torch.no_grad(), and compute it from the output"
                )
            return {}
        if _has_reentrant_checkpoint(value):
            raise DiagnosisError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which gives gradients to nobody but "
                "backward(): checkpoint(..., use_reentrant=False)"
            )
        self.backward = True
        try:
            found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        finally:
            self.backward = False
        return {name: g.detach() for name, g in zip(wanted, found, strict=True) if g is not None}

    def end(self, gradients: dict[str, Tensor]) -> None:
        """After a pass and its way back, with the gradients of the parameters."""
        self.end_with({name: self._square(gradient) for name, gradient in gradients.items()})

    def end_with(self, squares: dict[str, float]) -> None:
        """As `end`, with the squared norms of these gradients."""
        for seen in self.layers.values():
            if seen.arrived:
                seen.output_gradient.append(seen.squares)
            for name, _ in own_parameters(seen.module):
                square = squares.get(f"{seen.name}.{name}" if seen.name else name)
                if square is not None:
                    seen.weight_gradients.setdefault(name, []).append(square)
            seen.most_calls = max(seen.most_calls, seen.calls)
            seen.first_output = seen.last_input = None
            if seen.recurrent is not None:
                seen.recurrent.look(gradients=not self.lean)
        self.produced.clear()
        self.streams.end()

    def _before(self, seen: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts():
            if self.recording and transforms_active():
                self.unseen[seen.name] = None
            return
        if seen.order is None:
            seen.order, self.next = self.next, self.next + 1
        seen.calls += 1
        x = next(tensors_in((*args, *kwargs.values())), None)
        if x is None:
            return
        layout = self._layout(seen, x)
        if not x.is_nested and not self.lean:
            size = seen.input.add(x, layout, counted(module, x, kwargs) if seen.norm is not None else None)
            seen.spoilt_input = not math.isfinite(size)
        elif not x.is_nested:
            seen.input.note(x)
        if seen.nonlinearity is not None:
            seen.saturation.add(is_saturated(x.detach(), seen.nonlinearity), layout.feature)
        if seen.norm is not None:
            seen.norm.add(x, kwargs, args, self.samples, self.valid, lean=self.lean)
            seen.norm.fed_by.append(self._producer(seen, x))
            seen.last_input = x if seen.calls > 1 and not self.lean else None

    def _after(self, seen: Seen, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if not self._counts():
            return
        if seen.recurrent is not None:
            seen.recurrent.add(args, kwargs, result)
        y = next(tensors_in(result), None)
        if y is None:
            return
        if not y.is_nested:
            valid = counted(module, y, kwargs) if seen.norm is not None else None
            size = seen.output.add(y, Layout() if self.lean else self._layout(seen, y), valid)
            self.forward_trail.add(seen.name, size, comes_in=seen.spoilt_input)
        if seen.norm is not None and seen.calls == 1 and not self.lean:
            seen.first_output = y
        if y.requires_grad and y.grad_fn is not None:
            y.register_hook(functools.partial(self._arrived, seen, self._layout(seen, y)))
        if self._has_bias(seen):
            self.produced[y.untyped_storage().data_ptr()] = Produced(y, seen.name, y._version)

    def _follow_modules(self) -> None:
        """Keeps `inside` by hooks on every module but those inside a layer."""
        parts = {id(part) for seen in self.layers.values() if seen.role != "other" for part in seen.module.modules()}
        layers = {id(seen.module) for seen in self.layers.values()}
        for name, module in self.model.named_modules():
            if id(module) in layers or id(module) not in parts:
                self.handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
                self.handles.append(module.register_forward_hook(functools.partial(self._leave, name)))

    def _enter(self, name: str, *_: Any) -> None:
        if self.recording:
            self.inside.append(name)

    def _leave(self, name: str, *_: Any) -> None:
        # A module that raised has not left, and whoever calls it may have gone on.
        if self.recording and name in self.inside:
            del self.inside[len(self.inside) - 1 - self.inside[::-1].index(name) :]

    def _square(self, gradient: Tensor) -> float:
        return squared_norm(gradient, fast=self.lean)

    def _counts(self) -> bool:
        """Whether this is a pass to look at: not one in eval mode in the middle of somebody's training, and not one
        under torch.func's vmap or grad, whose tensors hold values that nobody may look at."""
        return self.recording and self.model.training and not transforms_active()

    def _layout(self, seen: Seen, x: Tensor) -> Layout:
        return self.layouts.of(seen.module, seen.role, x)

    def _has_bias(self, seen: Seen) -> bool:
        """Whether a norm behind the layer may take a bias away: of no interest to a lean watch."""
        return not self.lean and seen.role in ("linear", "conv") and getattr(seen.module, "bias", None) is not None

    def _producer(self, seen: Seen, x: Tensor) -> str | None:
        """The layer with a bias whose whole output `x` is, untouched, with features where the norm has them."""
        if x.is_nested:
            return None
        made = self.produced.get(x.untyped_storage().data_ptr())
        if made is None or made.version != x._version or made.tensor.numel() != x.numel():
            return None
        source = self.layers[made.layer]
        features = made.tensor.shape[self._layout(source, made.tensor).feature or 0]
        return made.layer if x.shape[self._layout(seen, x).feature or 0] == features else None

    @torch.no_grad()
    def _arrived(self, seen: Seen, layout: Layout, gradient: Tensor | None) -> None:
        if not self.backward or gradient is None:
            return
        seen.arrived = True
        square = self._square(gradient) / self.scale() ** 2
        seen.squares += square
        self.backward_trail.add(seen.name, math.sqrt(square) if square >= 0 else math.nan)
        if self._has_bias(seen) and layout.feature is not None:
            rows = gradient.movedim(layout.feature, 0).reshape(gradient.shape[layout.feature], -1).double()
            total, size = rows.sum(1), rows.abs().sum(1)
            seen.bias_sum = total.abs() if seen.bias_sum is None else seen.bias_sum + total.abs()
            seen.bias_size = size if seen.bias_size is None else seen.bias_size + size

    def _find_recurrences(self) -> None:
        """Norms with several calls a pass: does the last one's input depend on the first one's output?"""
        for seen in self.layers.values():
            first, last = seen.first_output, seen.last_input
            if seen.norm is None or first is None or last is None or not (first.requires_grad and last.requires_grad):
                continue
            (path,) = torch.autograd.grad(last.sum(), first, retain_graph=True, allow_unused=True)
            seen.norm.inside_recurrence = seen.norm.inside_recurrence or path is not None


def _has_reentrant_checkpoint(value: Tensor) -> bool:
    """Whether the graph behind `value` has a checkpoint whose inside autograd.grad would take for unused."""
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
    return False

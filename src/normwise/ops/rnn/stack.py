"""Recurrent layers on top of each other, each in one or both directions: from a user's call to a backend and back."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends._torch_internals import onednn_knows_bfloat16
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import (
    LayerKernel,
    LayerRequest,
    LayerResult,
    Layout,
    RecurrenceRequest,
    RecurrenceResult,
)
from normwise.backends.recurrence import Recurrence, Weights
from normwise.ops import custom_op, inputs, ragged, validity
from normwise.ops.autograd import RecurrentLayer
from normwise.ops.dispatch import is_transforming, resolve
from normwise.ops.errors import ShapeError
from normwise.ops.rnn import arguments, autocast, packed
from normwise.ops.rnn.between import Between, next_input
from normwise.ops.rnn.running_stats import BatchStats

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Layers(NamedTuple):
    """A stack of layers as a call finds it.

    Attributes:
        name: the layer's class, for messages.
        config: the recurrence, the same for all.
        weights: of each layer and direction, layer by layer, forward before backward.
        bidirectional, batch_first, dropout, training: as the layer's.
        batch_stats: what a batch norm inside the recurrence keeps; None unless there is one.
        between: what stands between layers beside dropout; None if nothing does.
    """

    name: str
    config: Recurrence
    weights: tuple[Weights, ...]
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    batch_stats: BatchStats | None = None
    between: Between | None = None

    def sizes(self, batch: int) -> list[tuple[int, int, int]]:
        """Shapes of h, and of an LSTM's c."""
        first, count = self.weights[0], len(self.weights)
        sizes = [(count, batch, first.weight_hh.shape[1])]
        if self.config.cell == "lstm":
            sizes.append((count, batch, first.weight_hh.shape[0] // 4))
        return sizes


def sequences(layers: Layers, x: Any, hx: Any, lengths: Any, reset: Any) -> tuple[Any, State]:
    """Whole sequences; arguments and results as of `normwise.nn.recurrent_base.Recurrent.forward`."""
    arguments.tensor_or_packed(x, layers.name, layers.config.cell)
    weights, both, batch_first = layers.weights, layers.bidirectional, layers.batch_first
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ValueError("got lengths together with a PackedSequence: it states its own lengths, leave them out")
        arguments.rows(x.data, weights[0])
        steps, batch, batched = len(x.batch_sizes), int(x.batch_sizes[0]), True
        shape: tuple[int, ...] = (steps, batch)
        given = packed.packed(x, both)
    elif x.is_nested:
        if lengths is not None:
            raise ValueError("got lengths together with a nested tensor: it states its own lengths, leave them out")
        ragged.of_steps(layers.name, x)
        given = packed.jagged(x, both)
        arguments.rows(given.x, weights[0])
        steps, batch, batched = given.layout.steps, given.layout.batch, True
        shape = (steps, batch)
    else:
        batched = x.dim() == 3
        batch_first = batch_first and batched
        if not batched:
            x = x.unsqueeze(1)
        arguments.rows(x, weights[0], batch_first)
        shape = x.shape
        steps, batch = shape[:2] if not batch_first else (shape[1], shape[0])
        if lengths is not None:
            lengths = arguments.lengths(lengths, steps, batch, batched, batch_first)
        given = packed.padded(x, lengths, batch_first, both)

    def other(given: int) -> str:
        return arguments.other_order(given, steps, batch, layers.batch_first) if batched else ""

    states = arguments.states(hx, layers.sizes(batch), given.x, batched, layers.name, other)
    if reset is not None:
        reset = _reset_flags(reset, steps, batch, given.x.device, batched, layers.batch_first)
    # An LSTM's output is what its backward reads, as with torch's fused ones; but rows of a PackedSequence are the
    # caller's own, and without a fused one, as for bfloat16 on some processors, torch's output may be changed.
    fused = layers.config.cell == "lstm" and not _steps_one_by_one(given.x)
    returns_copy = given.source is None and not (fused and given.packed is None)
    result = run(_request(layers, given, states, reset), returns_copy, layers.between)
    h, c = _finals(layers, given, result)
    found = packed.output(result.output, given, shape, batch_first)
    if not batched:
        found, h, c = found.squeeze(1), h.squeeze(1), None if c is None else c.squeeze(1)  # type: ignore[union-attr]
    return found, h if c is None else (h, c)


def step(layers: Layers, x: Any, state: Any, reset: Any, step: int | None) -> tuple[Tensor, State]:
    """One step; arguments and results as of `normwise.nn.recurrent_base.Recurrent.step`."""
    if layers.bidirectional:
        raise ValueError(
            "step() cannot run a bidirectional layer, whose backward direction starts at the end of the sequence: "
            "call the layer on whole sequences, or build it with bidirectional=False"
        )
    x, size, stats = inputs.tensor(f"{layers.name}.step", x), layers.weights[0].weight_ih.shape[-1], layers.batch_stats
    if x.dim() not in (1, 2):
        raise ShapeError(
            f"step() expects input of shape (batch, {size}) or ({size},), but got {tuple(x.shape)}: call the layer "
            "itself on whole sequences"
        )
    if stats is not None and layers.config.statistics == "sequence" and layers.training:
        raise ValueError(
            "step() has no sequence to take sequence-wise batch statistics of: use eval mode, or statistics='per_step'"
        )
    start_step = arguments.step_index(stats, step)
    batched = x.dim() == 2
    x = x.unsqueeze(0) if batched else x.view(1, 1, -1)
    arguments.rows(x, layers.weights[0])
    batch = x.shape[1]
    given = packed.padded(x, None, False, False)
    states = arguments.states(state, layers.sizes(batch), x, batched, layers.name)
    if reset is not None:
        reset = arguments.reset(reset, (batch,) if batched else (), "one for each sample", x.device).reshape(1, -1)
    result = run(_request(layers, given, states, reset, start_step), layers.config.cell != "lstm", layers.between)
    h, c = _finals(layers, given, result, start_step)
    if batched:
        return result.output[0], h if c is None else (h, c)
    h, c = h.squeeze(1), None if c is None else c.squeeze(1)
    return result.output.view(-1), h if c is None else (h, c)


def cell(layers: Layers, x: Any, hx: Any, step: int | None) -> State:
    """A cell's one step, (B, I) or (I,) and states in, the next states out."""
    name, weights = layers.name, layers.weights[0]
    lstm = layers.config.cell == "lstm"
    x = inputs.tensor(name, x)
    if lstm and hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise TypeError(f"{name}: expected hx to be a pair (h, c), but got {type(hx).__name__}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {x.dim()}D instead")
    size, units = weights.weight_ih.shape[-1], weights.weight_hh.shape[-1]
    if x.shape[-1] != size:
        raise ShapeError(f"input has inconsistent input_size: got {x.shape[-1]} expected {size}")
    start_step = arguments.step_index(layers.batch_stats, step)
    shape = (*x.shape[:-1], units)
    states: list[Any] = [None] * (1 + lstm) if hx is None else list(hx) if lstm else [hx]
    for n, state in enumerate(states):
        if state is not None and tuple(state.shape) != shape:
            raise ShapeError(f"{name}: Expected hidden[{n}] to be of shape {shape}, got {tuple(state.shape)}")
    if hx is not None:
        inputs.beside(x, h0=states[0], c0=states[1] if lstm else None)
        arguments.of_one_dtype(x, states)
    rows = x if x.dim() == 2 else x.unsqueeze(0)
    given = packed.Sequences(rows.unsqueeze(0), Layout(1, len(rows)))
    whole = (1, len(rows), units)
    h, *c = [rows.new_zeros(whole) if s is None else s.reshape(whole) for s in states]
    result = run(_request(layers, given, (h, c[0] if lstm else None), None, start_step, is_cell=True))
    new_h, new_c = _finals(layers, given, result, start_step)
    if x.dim() == 1:
        return new_h.view(units) if new_c is None else (new_h.view(units), new_c.view(units))
    return new_h[0] if new_c is None else (new_h[0], new_c[0])


def _reset_flags(reset: Any, steps: int, batch: int, device: torch.device, batched: bool, batch_first: bool) -> Tensor:
    """`reset` as (T, B)."""
    if not batched:
        return arguments.reset(reset, (steps,), "one for each step", device).unsqueeze(1)
    if batch_first:
        return arguments.reset(reset, (batch, steps), "batch first", device).transpose(0, 1)
    return arguments.reset(reset, (steps, batch), "steps first", device)


def _request(
    layers: Layers,
    given: packed.Sequences,
    states: tuple[Tensor, Tensor | None],
    reset: Tensor | None = None,
    start_step: int = 0,
    is_cell: bool = False,
) -> RecurrenceRequest:
    """A call of the layers in the form that backends take; `reset` is (T, B)."""
    config, x, stats, layout, (h0, c0) = layers.config, given.x, layers.batch_stats, given.layout, states
    if x.dim() == 3 and x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN: leave empty batches of steps out")
    if stats is not None and stats.uses_batch:
        _enough_samples(given, config)
    if given.order is not None:
        h0, c0 = packed.sort(h0, given.order), None if c0 is None else packed.sort(c0, given.order)
    resets: tuple[Tensor | None, Tensor | None] = (None, None)
    if reset is not None:
        inputs.beside(x, reset=reset)
        resets = packed.resets(given, reset, layers.bidirectional)
        layout = layout._replace(visible=packed.may_look(x, reset))
    return RecurrenceRequest(
        config,
        x,
        h0,
        c0,
        layers.weights,
        layout,
        resets,
        None if stats is None or stats.uses_batch else stats.tables,
        start_step,
        layers.bidirectional,
        layers.dropout,
        layers.training,
        is_cell,
        autocast.dtype_of(x),
    )


def _finals(
    layers: Layers, given: packed.Sequences, result: RecurrenceResult, start_step: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Final states in the given order of samples, after the running statistics were updated."""
    if layers.batch_stats is not None:
        layers.batch_stats.update(result.statistics, start_step)
    h, c, order = result.h, result.c, given.order
    if order is None:
        return h, c
    return packed.restore(h, order), None if c is None else packed.restore(c, order)


def _steps_one_by_one(x: Tensor) -> bool:
    """Whether torch's LSTM runs without a kernel of its own."""
    return x.dtype == torch.bfloat16 and on_cpu(x) and not onednn_knows_bfloat16()


def run(request: RecurrenceRequest, returns_copy: bool = False, between: Between | None = None) -> RecurrenceResult:
    """A stack by the backend that `resolve` names; `returns_copy` as in `autograd.RecurrentLayer`.

    A norm `between` layers is an operation of its own, which asks `resolve` for itself.
    """
    backend, _ = resolve(request, "recurrence")
    whole = backend.recurrence.kernels.get("stack")
    if whole is not None and whole.supports(request) is None and not is_transforming():
        forward = whole.forward
        if torch.compiler.is_compiling() and not request.is_cell:
            forward = functools.partial(_run_as_it_is, whole.forward)
        return forward(request) if between is None else _layer_by_layer(forward, request, between)
    kernel = backend.recurrence.kernels["layer"]
    config, x, h0, c0, weights, layout, resets, running, start_step, bidirectional, _, training, *_ = autocast.cast(
        request
    )
    for of_layer in weights:
        inputs.beside(x, **of_layer._asdict())
    directions = 2 if bidirectional else 1
    output = x
    results: list[LayerResult] = []
    returns_copy = returns_copy and directions == 1 and (between is None or not between.residual)
    with autocast.off(request):
        for n, of_layer in enumerate(weights):
            reverse = n % directions == 1
            if n and not reverse:
                x = next_input(request, between, n // directions - 1, output)
            zoneout_mask = None
            if training and config.zoneout:
                zoneout_mask = torch.rand(*x.shape[:-1], h0.shape[-1], device=x.device) < config.zoneout
            c, table = None if c0 is None else c0[n], None if running is None else running[n]
            of = LayerRequest(
                config, x, h0[n], c, of_layer, layout, reverse, resets[reverse], zoneout_mask, table, start_step
            )
            copies = returns_copy and n + 1 == len(weights)
            results.append(layer(kernel, of, copies, backend.name))
            if n % directions == directions - 1:
                output = _side_by_side(results, directions)
                if between is not None:
                    output = between.add_input(n // directions, output, x)
    h = torch.stack([r.h for r in results])
    finals = None if c0 is None else torch.stack([r.c for r in results])  # type: ignore[misc]
    return RecurrenceResult(output, h, finals, [r.statistics for r in results])


def _layer_by_layer(
    forward: Callable[[RecurrenceRequest], RecurrenceResult], request: RecurrenceRequest, between: Between
) -> RecurrenceResult:
    """A stack by kernels that know nothing between layers but dropout: a call for each layer."""
    directions = 2 if request.bidirectional else 1
    x = output = request.x
    h, c = [], []
    for k in range(len(request.weights) // directions):
        own = slice(k * directions, (k + 1) * directions)
        if k:
            with autocast.off(request):
                x = next_input(request, between, k - 1, output)
        c0 = None if request.c0 is None else request.c0[own]
        of = request._replace(x=x, h0=request.h0[own], c0=c0, weights=request.weights[own], dropout=0.0)
        result = forward(of)
        output = between.add_input(k, result.output, x)
        h.append(result.h)
        c += [] if result.c is None else [result.c]
    return RecurrenceResult(output, torch.cat(h), torch.cat(c) if c else None, [{}] * len(request.weights))


def _side_by_side(results: list[LayerResult], directions: int) -> Tensor:
    """The output of the last layer."""
    if directions == 1:
        return results[-1].output
    return torch.cat([results[-2].output, results[-1].output], -1)


def layer(kernel: LayerKernel, request: LayerRequest, returns_copy: bool = False, backend: str = "") -> LayerResult:
    """One layer in one direction by the `kernel` of a `backend`, whose name a node states; `returns_copy` as in
    `autograd.RecurrentLayer`."""
    if kernel.backward is None:
        return kernel.forward(request, False)
    config, x, h0, c0, weights, layout, reverse, reset, _, running, start_step = request
    tensors = x, h0.to(x.dtype), None if c0 is None else c0.to(x.dtype), *weights
    if torch.compiler.is_compiling():
        return custom_op.recurrence(backend, request._replace(h0=tensors[1], c0=tensors[2]), returns_copy)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return LayerResult(
            *RecurrentLayer.apply(kernel, returns_copy, config, layout, reverse, reset, running, start_step, *tensors)
        )
    return kernel.forward(request._replace(h0=tensors[1], c0=tensors[2]), False)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which torch.compile calls without looking inside: torch.compiler.disable at the first call.

    Not earlier, because torch.compiler.disable loads the compiler, which costs a second.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


@_as_it_is
def _run_as_it_is(
    forward: Callable[[RecurrenceRequest], RecurrenceResult], request: RecurrenceRequest
) -> RecurrenceResult:
    """A compiled model calls torch's own kernel as it is: torch.compile does the same with torch.nn's layers, and the
    compiler's own code for them may not even run."""
    return forward(request)


def _enough_samples(given: packed.Sequences, config: Recurrence) -> None:
    """The statistics of a step are over samples: a single one has no deviation."""
    layout, x = given.layout, given.x
    if layout.batch_sizes is not None:
        values = len(x) if config.statistics == "sequence" else int(layout.batch_sizes[:1].sum())
    else:
        values = layout.batch * (layout.steps if config.statistics == "sequence" else 1)
    validity.more_than_one(
        values,
        x,
        "Ways out: norm='layer' or 'rms', which need no batch; eval mode (model.eval() "
        "uses the running statistics); or DataLoader(drop_last=True) if only the last batch is this small.",
    )

"""What the recurrent kernels are given: which requests they take, and their tensors as the kernels read them.

All is float32, or x, the states and the two matrices are bfloat16 or float16 (or float64), and gains and biases of the
same dtype or float32. Products are in the dtype of x and as torch.backends says; everything else is computed in
float32.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.protocol import LayerRequest, Layout, RecurrenceRequest, Saved, accumulation_dtype
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import memory, runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A program keeps a whole row in registers.
MAX_UNITS = 8192

# Rows of a sample's sums, for G gates: G of the gradient of the summed input, which is that of the biases outside the
# norms; G of the gain on the hidden term or the sum; G of the gain on the input term, or of the bias inside the norm
# over the sum; and one each of a GRU's hidden bias of the candidate, of the cell norm's gain and of its bias.
SUMS = {gates: 3 * gates + 3 for gates in (1, 3, 4)}


def supports(request: RecurrenceRequest) -> str | None:
    """What the kernels cannot do; that Triton is not installed is the last reason to be named."""
    config, x = request.config, request.x
    if config.norm == "batch":
        return "the Triton kernels take no batch statistics inside a recurrence"
    if config.zoneout:
        return "the Triton kernels take no zoneout"
    if request.layout.lengths is not None and request.layout.lengths_on_cpu is None:
        return "the Triton kernels take the steps of each sequence, and must know how many they are"
    dtype = request.autocast or x.dtype
    for weights in request.weights:
        if weights.weight_hr is not None:
            return "the Triton kernels take no projection"
        if 0 in (weights.weight_ih.shape[-1], weights.weight_hh.shape[-1]):
            return "the Triton kernels have at least one input and one unit"
        if weights.weight_hh.shape[-1] > MAX_UNITS:
            return f"the Triton kernels take at most {MAX_UNITS} units, not {weights.weight_hh.shape[-1]}"
        if not _known_dtypes(dtype, weights, request.autocast is not None):
            dtypes = sorted({str(dtype), *(str(w.dtype) for w in weights if w is not None)})
            return (
                "the recurrent Triton kernels take x and matrices of one dtype, float32, bfloat16, float16 or float64, "
                f"and gains and biases of that dtype or float32, not {', '.join(dtypes)}"
            )
    return runtime.obstacle(x)


def _known_dtypes(dtype: torch.dtype, weights: Weights, autocast: bool) -> bool:
    vectors = (dtype, torch.float32)
    if dtype not in DTYPES or any(w is not None and w.dtype not in vectors for w in weights[2:]):
        return False
    return autocast or weights.weight_ih.dtype == weights.weight_hh.dtype == dtype


class Step(NamedTuple):
    """A step in the order of processing: its first row, and its samples, the first ones."""

    row: int
    samples: int


def _steps(layout: Layout, reverse: bool) -> Iterator[Step]:
    if layout.batch_sizes is None:
        order = range(layout.steps - 1, -1, -1) if reverse else range(layout.steps)
        yield from (Step(t * layout.batch, layout.batch) for t in order)
        return
    row = 0
    for samples in layout.batch_sizes.tolist():
        yield Step(row, samples)
        row += samples


class Readable(NamedTuple):
    """The tensors of a request as the kernels read them: contiguous, rows in the order of processing in which dense
    ones run backwards by themselves."""

    x: Tensor  # (rows, inputs)
    h0: Tensor
    c0: Tensor | None
    weights: Weights
    reset: Tensor | None
    flip: Tensor | None
    units: int
    wide: torch.dtype
    layout: Layout
    config: Recurrence
    reverse: bool

    @staticmethod
    def of(request: LayerRequest) -> "Readable":
        """Raises ValueError where a tensor is not of the shape that the kernels will read."""
        config, x, h0, c0, w, layout, reverse, reset, *_ = request
        units, inputs, batch = w.weight_hh.shape[1], x.shape[-1], layout.batch
        shape: tuple[int, ...] = (layout.steps, batch)
        flip = None
        if layout.batch_sizes is not None:
            _expect_falling(layout)
            shape = (sum(layout.batch_sizes.tolist()),)
            flip = layout.flip if reverse else None
            if reverse and flip is None:
                raise ValueError("flip: missing; packed rows run backwards by it")
            if flip is not None:
                expect("flip", flip, shape, x, (torch.int64,))
        expect("x", x, (*shape, inputs), x, DTYPES)
        if reset is not None:
            expect("reset", reset, shape, x, (torch.bool,))
            reset = flipped(reset, flip).reshape(-1).contiguous()
        for name, expected in config.shapes(inputs, units).items():
            t = getattr(w, name)
            if t is None and not name.startswith("bias"):
                raise ValueError(f"{name}: missing")
            if t is not None:
                expect(name, t, expected, x, (x.dtype,) if name.startswith("weight") else (x.dtype, torch.float32))
        if (c0 is None) == (config.cell == "lstm"):
            raise ValueError("an LSTM, and it alone, has a cell state c0")
        for name, state in (("h0", h0), ("c0", c0)):
            if state is not None:
                expect(name, state, (batch, units), x, (x.dtype,))
        return Readable(
            flipped(x, flip).reshape(-1, inputs).contiguous(),
            h0.contiguous(),
            None if c0 is None else c0.contiguous(),
            Weights(*(None if t is None else t.contiguous() for t in w)),  # type: ignore[arg-type]
            reset,
            flip,
            units,
            accumulation_dtype(x.dtype),
            layout,
            config,
            reverse,
        )

    def start(self, step: Step, state: Tensor, rows: Tensor) -> None:
        """Write the initial `state` where the first step reads it."""
        rows, state = rows[: step.samples], state[: step.samples]
        if self.reset is None:
            rows.copy_(state)
        else:
            rows.copy_(state.masked_fill(self.reset[step.row : step.row + step.samples, None], 0))

    @property
    def steps(self) -> list[Step]:
        """In the order of processing."""
        return list(_steps(self.layout, self.reverse))

    @property
    def batch(self) -> int:
        return self.layout.batch

    @property
    def resets(self) -> Tensor | None:
        """`reset` as bytes."""
        return None if self.reset is None else self.reset.view(torch.uint8)

    @property
    def shares_gradient(self) -> bool:
        """One gradient does for both terms: none has a norm or, as the candidate of torch's GRU, a gate of its own."""
        w = self.weights
        return w.gain_hh is None and w.gain_ih is None and not (self.config.cell == "gru" and self.config.reset_after)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Biases and gains in the kernels' order."""
        w = self.weights
        return w.bias_ih, w.bias_hh, w.gain_ih, w.gain_hh, w.gain_sum, w.bias_inner, w.gain_c, w.bias_c


def _expect_falling(layout: Layout) -> None:
    sizes = [layout.batch, *layout.batch_sizes.tolist()]  # type: ignore[union-attr]
    if len(sizes) != layout.steps + 1 or sizes != sorted(sizes, reverse=True) or sizes[-1] < 0:
        raise ValueError(f"batch_sizes: expected {layout.steps} that fall from at most {layout.batch}, got {sizes[1:]}")


# What a forward keeps for the backward, row by row in the order of processing: both products with the input and with
# the state, and the states before each step.
SAVED = ("p", "q", "h", "c")


def saves(config: Recurrence, inputs: int, units: int, dtype: torch.dtype) -> tuple[Saved, ...]:
    """Of `SAVED`."""
    gates = config.gates * units
    cells = units if config.cell == "lstm" else 0
    return Saved(gates, dtype), Saved(gates, dtype), Saved(units, dtype), Saved(cells, accumulation_dtype(dtype))


def kept(at: Readable, saved: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the forward kept, contiguous: hooks on saved tensors may have put others in its place."""
    rows, found = len(at.x), []
    expected = saves(at.config, at.x.shape[1], at.units, at.x.dtype)
    for name, (width, dtype, _), t in zip(SAVED, expected, saved, strict=False):
        if t is None and width:
            raise ValueError(f"{name}: missing; the forward keeps it with needs_grad=True")
        if t is not None:
            expect(name, t, (rows, width), at.x, (dtype,))
        found.append(None if t is None else t.contiguous())
    if len(found) < len(expected):
        raise ValueError("the forward keeps what the backward needs with needs_grad=True")
    p, q, h, c = found
    return p, q, h, c  # type: ignore[return-value]


def expect(name: str, t: Tensor, shape: tuple[int, ...], beside: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape or t.dtype not in dtypes or t.device != beside.device:
        found = f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        accepted = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise ValueError(f"{name}: expected {tuple(shape)} of {accepted} on {beside.device}, but got {found}")


def flipped(rows: Tensor, flip: Tensor | None) -> Tensor:
    return rows if flip is None else rows.index_select(0, flip)


def wide_copy(name: str, grad: Tensor | None, state: Tensor, wide: torch.dtype) -> Tensor:
    """A copy, or zeros, since the result is written over it."""
    if grad is None:
        return torch.zeros_like(state, dtype=wide)
    expect(name, grad, tuple(state.shape), state, DTYPES)
    return torch.empty_like(state, dtype=wide).copy_(grad)


@cache
def constants(config: Recurrence, units: int, wide: torch.dtype) -> dict[str, Any]:
    """The constants of every kernel, in which the recurrence is described."""
    sizes = config.groups or (config.gates,)
    members = [(group, size) for group, size in enumerate(sizes) for _ in range(size)]
    members += [(3, 1)] * (4 - len(members))
    return {
        "CELL": f"rnn_{config.nonlinearity}" if config.cell == "rnn" else config.cell,
        "GATES": config.gates,
        "GROUPS": sum(group << 2 * gate for gate, (group, _) in enumerate(members)),
        "COUNTS": sum(size << 3 * gate for gate, (_, size) in enumerate(members)),
        "EPS": config.eps,
        "CENTER": config.norm == "layer",
        "CELL_NORM": config.cell_norm,
        "RESET_AFTER": config.reset_after,
        "PAPER_GATE": config.update_gate == "paper",
        "UPDATE_OFFSET": config.update_offset,
        "WIDE": memory.wide(wide),
        "UNITS": units,
    }

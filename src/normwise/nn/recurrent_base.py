"""What RNN, GRU and LSTM share: building, checking and laying out; each call is one into `ops.recurrent`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from normwise.nn import recurrent_parameters as parameters
from normwise.nn.construct import NotScripted
from normwise.ops import check, recurrent, symbolic
from normwise.reference.recurrence import Cell, NormKind, Recurrence

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Recurrent(NotScripted, RNNBase):
    """A stack of recurrent layers, each in one or both directions.

    A subclass of torch's base class, whose parameters, checks and pickling it keeps, but not of nn.LSTM and its
    siblings: torch.compile refuses these.
    """

    cell: ClassVar[Cell]
    meets: parameters.Meets | None = None

    def _build(
        self,
        arguments: dict[str, Any],
        norm: NormKind | None,
        variant: str | Recurrence | None,
        max_length: int,
        momentum: float,
        **changes: Any,
    ) -> None:
        parameters.forget_bias_needs_bias(changes.get("forget_bias"), arguments["bias"])
        max_length = parameters.positive_rows(max_length)
        for size in ("input_size", "hidden_size", "num_layers", "proj_size"):
            if size in arguments:
                arguments[size] = check.whole_number(size, arguments[size])
        check.momentum_range(momentum)
        how, name = parameters.describe(self.cell, norm, variant, **changes)
        # Before torch's constructor, which calls reset_parameters and flatten_parameters.
        self.recurrence = how
        self.variant = name
        self.nonlinearity = how.nonlinearity
        self.max_length = 1 if how.statistics == "sequence" else max_length
        self.momentum = momentum
        self.warned_of_length = False
        kind = f"RNN_{how.nonlinearity.upper()}" if self.cell == "rnn" else self.cell.upper()
        super().__init__(kind, **arguments)
        if how.norm is None:
            return
        for layer, suffix in self._places():
            inputs = self.input_size if layer == 0 else self._output_size() * (1 + self.bidirectional)
            shapes = how.shapes(inputs, self.hidden_size, proj_size=self.proj_size, bias=self.bias)
            parameters.add_to(self, how, shapes, suffix, rows=self.max_length, hidden_size=self.hidden_size)
        self._all_weights = [[n for n in names if hasattr(self, n)] for names in self._all_weights]
        self._flat_weights_names = [n for names in self._all_weights for n in names]
        self._init_flat_weights()
        self._reset_norms()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), as torch; biases 0, gains as the preset says."""
        super().reset_parameters()
        self._reset_norms()

    def flatten_parameters(self) -> None:
        """One block of memory for cuDNN, which runs the layer only if it has no norm."""
        if self.recurrence.norm is None:
            super().flatten_parameters()

    @classmethod
    def from_torch(cls, layer: nn.Module, *, norm: NormKind | None = "layer", **options: Any) -> Any:
        """A layer that starts from the weights of a plain torch.nn layer of the same cell.

        Sizes, layers, directions, dropout, device and dtype are the plain layer's. Its biases are kept and stand
        behind the norms; where the recurrence has one bias instead of torch's two, it gets their sum. Gains start as
        the preset says.

        Args:
            layer: an nn.RNN, nn.GRU or nn.LSTM.
            norm: as in the constructor.
            options: the constructor's other keyword-only arguments, but `forget_bias`.

        Raises:
            TypeError: a layer of another kind, or `forget_bias`.
        """
        wanted = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cls.cell]
        if not isinstance(layer, wanted):
            raise TypeError(
                f"{cls.__name__}.from_torch expects a torch.nn.{wanted.__name__}, but got {type(layer).__name__}"
            )
        if "forget_bias" in options:
            raise TypeError("from_torch keeps the plain layer's biases: set forget_bias on these")
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += {"lstm": ["proj_size"], "gru": [], "rnn": ["nonlinearity"]}[cls.cell]
        arguments = {name: getattr(layer, name) for name in names}
        weight = layer.get_parameter("weight_ih_l0")
        made: Recurrent = cls(  # type: ignore[call-arg]
            **arguments, device=weight.device, dtype=weight.dtype, norm=norm, **options
        )
        for _, suffix in made._places():
            parameters.start_from(made, layer, suffix)
        made.train(layer.training)
        return made

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        """Run whole sequences; torch.nn's arguments and return values.

        Args:
            input: (T, B, I), or (B, T, I) with `batch_first`, or (T, I) without a batch, or a PackedSequence.
            hx: initial state (L * D, B, H), a pair (h, c) for an LSTM; None means zeros.
            lengths: (B,) integers in [0, T], in any order: the valid steps of each sequence. What lies beyond may
                hold anything; there the output is 0, and the final state is that of the last valid step.
            reset: bool, (T, B), or (B, T) with `batch_first`, or (T,) without a batch; for packed input as for
                padded. True zeroes the state before that step, in both directions between steps t-1 and t.

        Returns:
            (output, state): output like the input with D * H features, state like `hx`. A GRU's and an RNN's output may
            be changed in place before the backward; an LSTM's is kept for it, and a change raises torch's error there,
            as with torch.nn.LSTM on the CPU.

        Raises:
            RuntimeError, ValueError, TypeError: what does not fit is named; see the messages.
        """
        if symbolic.is_traced(input, hx, lengths, reset):
            return symbolic.call_layer(self, input, hx=hx, lengths=lengths, reset=reset)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(
                    "got lengths together with a PackedSequence: it states its own lengths, leave them out"
                )
            return self._forward_packed(input, hx, reset)
        if not isinstance(input, Tensor):
            raise TypeError(f"expected a tensor or a PackedSequence, but got {type(input).__name__}")
        if input.dim() not in (2, 3):
            end = "D tensor instead" if self.cell == "rnn" else "D instead"
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}{end}")
        batched = input.dim() == 3
        turned = batched and self.batch_first
        x = input if batched else input.unsqueeze(1)
        self.check_input(x, None)
        if turned:
            x = x.transpose(0, 1)
        steps, batch = x.shape[:2]
        if lengths is not None:
            lengths = recurrent.checked_lengths(lengths, steps, batch, x.device, batched)
        states = self._states(hx, x, batch, batched)
        output, states = self._run(x, states, lengths, self._reset_flags(reset, x, batched))
        if not batched:
            return output.squeeze(1), _joined([s.squeeze(1) for s in states])
        return (output.transpose(0, 1) if turned else output), _joined(states)

    def _forward_packed(self, packed: PackedSequence, hx: Any, reset: Tensor | None) -> Any:
        self.check_input(packed.data, packed.batch_sizes)
        states = self._states(hx, packed.data, int(packed.batch_sizes[0]), True)
        if recurrent.is_plain(self.recurrence, reset):
            output, states = self._run(packed, states, None, None)
            return output, _joined(states)
        x, lengths = recurrent.unpack(packed)
        output, states = self._run(x, states, lengths, self._reset_flags(reset, x, True))
        return recurrent.pack_like(output, lengths, packed), _joined(states)

    def step(self, input: Tensor, state: Any = None, *, reset: Tensor | None = None, t: int | None = None) -> Any:
        """One step with the same weights, for streaming and for acting in an environment.

        Args:
            input: (B, I), or (I,) without a batch.
            state: what the last call returned, or None for zeros: (L, B, H), a pair for an LSTM; (L, H) without a
                batch.
            reset: (B,) bool, True zeroes that sample's state before the step; () without a batch.
            t: the index of the step in its sequence, from 0, which per-step batch statistics need.

        Returns:
            (output (B, H), state).

        Raises:
            ValueError: a bidirectional layer (it needs the future), `t` missing or negative, or sequence-wise batch
                statistics in training (they need the whole sequence).
        """
        if self.bidirectional:
            raise ValueError(
                "step() cannot run a bidirectional layer, whose backward direction starts at the end of the sequence: "
                "call the layer on whole sequences, or build it with bidirectional=False"
            )
        how = self.recurrence
        check.tensor(f"{type(self).__name__}.step", input)
        if input.dim() not in (1, 2):
            raise check.ShapeError(
                f"step() expects input of shape (batch, {self.input_size}) or ({self.input_size},), but got "
                f"{tuple(input.shape)}: call the layer itself on whole sequences"
            )
        if how.norm == "batch" and how.statistics == "sequence" and self.training:
            raise ValueError(
                "step() has no sequence to take sequence-wise batch statistics of: use eval mode, or statistics='frame'"
            )
        first = parameters.step_index(how, self.max_length, t)
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input.view(1, 1, -1)
        self.check_input(x, None)
        states = self._states(state, x, x.shape[1], batched)
        if reset is not None:
            reset = recurrent.checked_reset(reset, (x.shape[1],) if batched else (), "one for each sample", x.device)
            reset = reset.reshape(1, -1)
        output, states = self._run(x, states, None, reset, first)
        if not batched:
            return output.view(-1), _joined([s.squeeze(1) for s in states])
        return output[0], _joined(states)

    def _run(
        self,
        x: Tensor | PackedSequence,
        states: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        first: int = 0,
    ) -> tuple[Any, list[Tensor]]:
        """(T, B, I) and states (L * D, B, H) in, the same out; running statistics moved in training."""
        how, suffixes = self.recurrence, [suffix for _, suffix in self._places()]
        weights = [parameters.weights_of(self, suffix) for suffix in suffixes]
        inputs = (states[0], states[1] if len(states) > 1 else None, weights, how)
        shared: dict[str, Any] = {
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "training": self.training,
        }
        plain = isinstance(x, PackedSequence) or recurrent.is_plain(how, reset)
        if plain and not recurrent.compiled_plain(x, weights, how):
            if lengths is None:
                output, h, c = recurrent.plain(x, *inputs, **shared)
            else:
                assert isinstance(x, Tensor)
                output, h, c = recurrent.plain_padded(x, *inputs, lengths, **shared)
        else:
            assert isinstance(x, Tensor)
            tables = [parameters.running_of(self, how, suffix) for suffix in suffixes]
            learns = self.training or self.meets is not None
            given = tables if how.norm == "batch" and not learns else None
            output, h, c, statistics = recurrent.stack(
                x, *inputs, lengths=lengths, reset=reset, running=given, first=first, **shared
            )
            if how.norm == "batch":
                self._warn_of_length(first + len(x))
            for suffix, table, used in zip(suffixes, tables, statistics, strict=True):
                parameters.learn(self, table, used, first, suffix)
        return output, [s for s in (h, c) if s is not None]

    def _warn_of_length(self, steps: int) -> None:
        shared = self.max_length == 1  # one row for all steps is a choice, not an accident
        if steps <= self.max_length or shared or self.warned_of_length or torch.compiler.is_compiling():
            return
        self.warned_of_length = True
        warnings.warn(
            f"a sequence of {steps} steps is longer than max_length={self.max_length}: all later steps use the last "
            "step's running statistics (this is said once)",
            stacklevel=4,
        )

    def _states(self, hx: Any, x: Tensor, batch: int, batched: bool) -> list[Tensor]:
        """Initial states (L * D, B, H), checked: [h] or [h, c]."""
        count = self.num_layers * (1 + self.bidirectional)
        sizes = [(count, batch, self._output_size())]
        if self.cell == "lstm":
            sizes.append((count, batch, self.hidden_size))
        if hx is None:
            zeros = x.new_zeros(sizes[0])  # nobody writes on an initial state
            return [zeros if size == sizes[0] else x.new_zeros(size) for size in sizes]
        lstm = self.cell == "lstm"
        if lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            raise TypeError(f"LSTM: expected hx to be a pair (h_0, c_0), but got {type(hx).__name__}")
        if not lstm and not isinstance(hx, Tensor):
            raise TypeError(f"{type(self).__name__}: expected hx to be a tensor, but got {type(hx).__name__}")
        states = list(hx) if lstm else [hx]
        wanted = 3 if batched else 2
        if any(s.dim() != wanted for s in states):
            ranks = ", ".join(f"{s.dim()}-D" for s in states)
            kind = "batched 3-D" if batched else "unbatched 2-D"
            what = (
                f"hx and cx should also be {wanted}-D but got ({ranks}) tensors"
                if lstm
                else f"hx should also be {wanted}-D but got {ranks} tensor"
            )
            raise RuntimeError(f"For {kind} input, {what}")
        if not batched:
            states = [s.unsqueeze(1) for s in states]
        for n, (state, size) in enumerate(zip(states, sizes, strict=True)):
            which = f"hidden[{n}]" if lstm else "hidden"
            self.check_hidden_size(state, size, f"Expected {which} size {{}}, got {{}}")
        return states

    def _reset_flags(self, reset: Any, x: Tensor, batched: bool) -> Tensor | None:
        """`reset` as (T, B), for an `x` of (T, B, I)."""
        if reset is None:
            return None
        steps, batch = x.shape[:2]
        if not batched:
            return recurrent.checked_reset(reset, (steps,), "one for each step", x.device).unsqueeze(1)
        if self.batch_first:
            return recurrent.checked_reset(reset, (batch, steps), "batch first", x.device).transpose(0, 1)
        return recurrent.checked_reset(reset, (steps, batch), "steps first", x.device)

    def _output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def _places(self) -> list[tuple[int, str]]:
        """(layer, suffix of its parameters' names) of each layer and direction, in torch's order."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(layer, f"_l{layer}{d}") for layer in range(self.num_layers) for d in directions]

    def _reset_norms(self) -> None:
        for _, suffix in self._places():
            parameters.reset_norms(self, self.recurrence, suffix)

    def extra_repr(self) -> str:
        how = self.recurrence
        said = f", norm={how.norm!r}"
        if self.nonlinearity != "tanh":
            said = f", nonlinearity={self.nonlinearity!r}{said}"
        if self.variant is not None:
            said += f", variant={self.variant!r}"
        if how.zoneout:
            said += f", zoneout={how.zoneout}"
        if how.norm == "batch":
            said += f", max_length={self.max_length}, momentum={self.momentum}"
        return str(super().extra_repr()) + said


def _joined(states: Sequence[Tensor]) -> State:
    """h alone, or the pair (h, c)."""
    return states[0] if len(states) == 1 else (states[0], states[1])

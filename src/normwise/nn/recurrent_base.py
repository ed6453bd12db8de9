"""What RNN, GRU and LSTM share: building, and one call into `ops.rnn.stack` each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.recurrence import Cell, NormKind, Recurrence
from normwise.backends.scalars import flags
from normwise.nn import recurrent_parameters as parameters
from normwise.nn.construct import NotScripted
from normwise.ops import hyperparameters, ragged, symbolic
from normwise.ops.rnn import stack
from normwise.ops.rnn.between import BetweenNorm
from normwise.ops.rnn.running_stats import StatsObserver


class Recurrent(NotScripted, RNNBase):
    """A stack of recurrent layers, each in one or both directions.

    A subclass of torch's base class, whose parameters, checks and pickling it keeps, but not of nn.LSTM and its
    siblings: torch.compile refuses these.
    """

    cell: ClassVar[Cell]
    stats_observer: StatsObserver | None = None
    # Of the class, for layers that were pickled without them.
    between: BetweenNorm | None = None
    residual: bool = False

    def _build(
        self,
        arguments: dict[str, Any],
        norm: NormKind | None,
        variant: str | Recurrence | None,
        num_stat_steps: int,
        momentum: float,
        between: BetweenNorm | None,
        residual: bool,
        **changes: Any,
    ) -> None:
        hyperparameters.dropout_range(arguments["dropout"])
        flags(**{name: arguments[name] for name in ("bias", "batch_first", "bidirectional")})
        parameters.forget_bias_needs_bias(changes.get("forget_bias"), arguments["bias"])
        num_stat_steps = parameters.positive_rows(num_stat_steps)
        for size in ("input_size", "hidden_size", "num_layers", "proj_size"):
            if size in arguments:
                arguments[size] = hyperparameters.whole_number(size, arguments[size])
        hyperparameters.momentum_range(momentum, may_be_none=False)
        parameters.check_between(between, residual, arguments["num_layers"])
        config, name = parameters.describe(self.cell, norm, variant, **changes)
        # Before torch's constructor, which calls reset_parameters and flatten_parameters.
        self.recurrence = config
        self.variant = name
        self.nonlinearity = config.nonlinearity
        self.num_stat_steps = 1 if config.statistics == "sequence" else num_stat_steps
        self.momentum = momentum
        self.between, self.residual = between, residual
        self.warned_of_length = False
        kind = f"RNN_{config.nonlinearity.upper()}" if self.cell == "rnn" else self.cell.upper()
        super().__init__(kind, **arguments)
        parameters.register_between(self, self._width())
        if config.norm is None:
            parameters.reset_between(self)
            return
        for layer, suffix in self._places():
            inputs = self.input_size if layer == 0 else self._width()
            shapes = config.shapes(inputs, self.hidden_size, proj_size=self.proj_size, bias=self.bias)
            parameters.register_norm_parameters(
                self, config, shapes, suffix, rows=self.num_stat_steps, hidden_size=self.hidden_size
            )
        self._all_weights = [[n for n in names if hasattr(self, n)] for names in self._all_weights]
        self._flat_weights_names = [n for names in self._all_weights for n in names]
        self._init_flat_weights()
        self._reset_norms()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), as torch; biases 0, gains as the preset says."""
        super().reset_parameters()
        self._reset_norms()

    def flatten_parameters(self) -> None:
        """One block of memory for cuDNN, which runs the layer only if it has no norm; a block for each layer where
        each is a call of its own."""
        if self.recurrence.norm is not None:
            return
        if self.num_layers == 1 or (self.between is None and not self.residual):
            super().flatten_parameters()
            return
        before = {n: vars(self)[n] for n in ("num_layers", "input_size", "_flat_weights", "_flat_weights_names")}
        count = len(self._flat_weights_names) // self.num_layers
        try:
            for k in range(before["num_layers"]):
                own = slice(k * count, (k + 1) * count)
                self._flat_weights = before["_flat_weights"][own]
                self._flat_weights_names = before["_flat_weights_names"][own]
                self.num_layers, self.input_size = 1, before["input_size"] if k == 0 else self._width()
                super().flatten_parameters()
        finally:
            vars(self).update(before)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch.nn. Where gains are missing, as in what torch.nn's layer keeps, the error says how that is taken
        over."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            gains = [name for name in self.state_dict() if name.startswith("gain_")]
            if not strict or not gains or any(name in state_dict for name in gains):
                raise
            name, norm = type(self).__name__, self.recurrence.norm
            of_layer = "layer" if norm == "layer" else f"layer, norm={norm!r}"
            of_model = "" if norm is None else f", or of a whole model by normwise.convert(model, recurrent={norm!r})"
            raise RuntimeError(
                f"{error}\n\tThe state_dict has no gains. The weights of a torch.nn.{name} are taken over by "
                f"normwise.{name}.from_torch({of_layer}){of_model}"
            ) from None

    @classmethod
    def from_torch(cls, layer: nn.Module, *, norm: NormKind | None = "layer", **options: Any) -> Any:
        """A layer that starts from the weights of a torch.nn layer of the same cell.

        Sizes, layers, directions, dropout, device and dtype are that layer's. Its biases are kept and stand
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
            found, cure = type(layer).__name__, ""
            if isinstance(layer, Recurrent):
                found, cure = f"normwise.{found}", ": copy it by copy.deepcopy(layer)"
            raise TypeError(f"{cls.__name__}.from_torch expects a torch.nn.{wanted.__name__}, but got {found}{cure}")
        if "forget_bias" in options:
            raise TypeError("from_torch keeps the layer's biases: set forget_bias on these")
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += {"lstm": ["proj_size"], "gru": [], "rnn": ["nonlinearity"]}[cls.cell]
        arguments = {name: getattr(layer, name) for name in names}
        weight = layer.get_parameter("weight_ih_l0")
        made: Recurrent = cls(  # type: ignore[call-arg]
            **arguments, device=weight.device, dtype=weight.dtype, norm=norm, **options
        )
        for _, suffix in made._places():
            parameters.copy_from_torch(made, layer, suffix)
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
            input: (T, B, I), or (B, T, I) with `batch_first`, or (T, I) without a batch, or a PackedSequence, or a
                jagged nested tensor (B, T, I) with T ragged.
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
        found = stack.sequences(self._layers(), input, hx, lengths, reset)
        if self.recurrence.norm == "batch":
            self._warn_of_length(input)
        return found

    def step(self, input: Tensor, state: Any = None, *, reset: Tensor | None = None, step: int | None = None) -> Any:
        """One step with the same weights, for streaming and for acting in an environment.

        Args:
            input: (B, I), or (I,) without a batch.
            state: what the last call returned, or None for zeros: (L, B, H), a pair for an LSTM; (L, H) without a
                batch.
            reset: (B,) bool, True zeroes that sample's state before the step; () without a batch.
            step: the index of the step in its sequence, from 0, which per-step batch statistics need.

        Returns:
            (output (B, H), state).

        Raises:
            ValueError: a bidirectional layer (it needs the future), `step` missing or negative, or sequence-wise batch
                statistics in training (they need the whole sequence).
        """
        found = stack.step(self._layers(), input, state, reset, step)
        if self.recurrence.norm == "batch":
            self._warn_beyond((step or 0) + 1)
        return found

    def _layers(self) -> stack.Layers:
        """The layers as a call finds them."""
        suffixes = tuple(suffix for _, suffix in self._places())
        return stack.Layers(
            type(self).__name__,
            self.recurrence,
            tuple(parameters.weights_of(self, suffix) for suffix in suffixes),
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            parameters.batch_stats_of(self, suffixes),
            parameters.between_of(self),
        )

    def _warn_of_length(self, input: Tensor | PackedSequence) -> None:
        if isinstance(input, PackedSequence):
            self._warn_beyond(len(input.batch_sizes))
        elif input.is_nested:
            self._warn_beyond(ragged.longest(input))
        else:
            self._warn_beyond(input.shape[1 if self.batch_first and input.dim() == 3 else 0])

    def _warn_beyond(self, steps: int) -> None:
        shared = self.num_stat_steps == 1  # one row for all steps is a choice, not an accident
        if steps <= self.num_stat_steps or shared or self.warned_of_length or torch.compiler.is_compiling():
            return
        self.warned_of_length = True
        warnings.warn(
            f"a sequence of {steps} steps is longer than num_stat_steps={self.num_stat_steps}: all later steps use the "
            "last step's running statistics (this is said once)",
            stacklevel=4,
        )

    def _width(self) -> int:
        """Features of the output of each layer."""
        return int(self.proj_size or self.hidden_size) * (1 + self.bidirectional)

    def _places(self) -> list[tuple[int, str]]:
        """(layer, suffix of its parameters' names) of each layer and direction, in torch's order."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(layer, f"_l{layer}{d}") for layer in range(self.num_layers) for d in directions]

    def _reset_norms(self) -> None:
        for _, suffix in self._places():
            parameters.reset_norms(self, self.recurrence, suffix)
        parameters.reset_between(self)

    def extra_repr(self) -> str:
        config = self.recurrence
        said = f", norm={config.norm!r}"
        if self.nonlinearity != "tanh":
            said = f", nonlinearity={self.nonlinearity!r}{said}"
        if self.variant is not None:
            said += f", variant={self.variant!r}"
        if config.zoneout:
            said += f", zoneout={config.zoneout}"
        if self.between is not None:
            said += f", between={self.between!r}"
        if self.residual:
            said += f", residual={self.residual}"
        if config.norm == "batch":
            said += f", num_stat_steps={self.num_stat_steps}, momentum={self.momentum}"
        return str(super().extra_repr()) + said

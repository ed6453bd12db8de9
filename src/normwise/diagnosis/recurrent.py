"""The inside of recurrent layers: gates, summed inputs and gradients at each time step, recomputed step by step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from normwise.backends.recurrence import GATES, Recurrence, Weights
from normwise.backends.reference.recurrence import Step, recurrence
from normwise.backends.reference.sequences import valid_steps
from normwise.diagnosis import records
from normwise.measure.gradients import squared_norm
from normwise.measure.saturation import THRESHOLDS, is_saturated
from normwise.measure.time_steps import StepMeans, gate_inputs, summed_inputs
from normwise.nn.recurrent_base import Recurrent
from normwise.nn.recurrent_parameters import between_of, running_of, weights_of


class PlaceWatch:
    """One layer in one direction: sums over the batches."""

    def __init__(self, config: Recurrence) -> None:
        self.config = config
        self.gates = [StepMeans() for _ in GATES[config.cell]]
        self.summed, self.state, self.gradient = StepMeans(), StepMeans(), StepMeans()
        self.error = 0.0

    def add(self, tape: list[Step], valid: Tensor, gradients: list[Tensor | None]) -> None:
        """One batch; `valid` (T, B) in the order of processing."""
        for gate, means in enumerate(self.gates):
            saturated = is_saturated(gate_inputs(tape, gate), self.nonlinearity(gate))
            means.add(saturated.double().mean(-1), valid)
        states = torch.stack([step.h.detach() for step in tape])
        for means, values in ((self.summed, summed_inputs(tape)), (self.state, states)):
            means.add(values.double().square().mean(-1), valid)
        if any(g is not None for g in gradients):
            squares = torch.tensor([0.0 if g is None else squared_norm(g) for g in gradients])
            self.gradient.add_sums(squares, torch.ones(len(squares)))

    def nonlinearity(self, gate: int) -> str:
        name = GATES[self.config.cell][gate]
        if self.config.cell == "rnn":
            return self.config.nonlinearity
        return "tanh" if name in ("g", "n") else "sigmoid"

    def record(self, place: str, shared: bool, exact: bool) -> records.Recurrence:
        steps = self.state.steps()
        gates = [
            records.Gate(name, THRESHOLDS[self.nonlinearity(k)], means.overall(), means.mean()[:steps].tolist())
            for k, (name, means) in enumerate(zip(GATES[self.config.cell], self.gates, strict=True))
        ]
        return records.Recurrence(
            place,
            self.config.cell,
            self.config.norm,
            shared,
            gates,
            self.summed.mean().sqrt()[:steps].tolist(),
            self.state.mean().sqrt()[:steps].tolist(),
            self.gradient.mean().sqrt()[:steps].tolist(),
            self.error if exact else None,
        )


class RecurrentWatch:
    """A recurrent module (torch's, or this library's) over the batches."""

    def __init__(self, module: RNNBase) -> None:
        self.module = module
        self.config = description(module)
        self.places = [
            f"l{layer}{end}"
            for layer in range(module.num_layers)
            for end in (("", "_reverse") if module.bidirectional else ("",))
        ]
        self.watches = {place: PlaceWatch(self.config) for place in self.places}
        self.calls: list[Call] = []

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One call of the present pass, whose gradients arrive later."""
        if self.config is not None and isinstance(result, tuple) and len(result) == 2:
            self.calls.append(Call(args, kwargs, result))

    def look(self, gradients: bool = True) -> None:
        """After the backward pass: recompute its calls step by step, and forget them."""
        calls, self.calls = self.calls, []
        for call in calls:
            self._look_at(call, gradients)

    def _look_at(self, call: Call, gradients: bool) -> None:
        module, config = self.module, self.config
        x, lengths = call.padded(module.batch_first)
        steps, batch = x.shape[:2]
        valid = torch.ones(steps, batch, dtype=torch.bool, device=x.device)
        if lengths is not None:
            valid = valid_steps(steps, lengths)
        states = call.states(module, x)
        directions = 2 if module.bidirectional else 1
        running = (
            None
            if module.training or config.norm != "batch"
            else [running_of(module, config, f"_{p}") for p in self.places]
        )
        between = between_of(module) if isinstance(module, Recurrent) else None
        tapes: list[list[Step]] = []
        finals: list[list[Tensor]] = []
        x = x.detach()
        with torch.set_grad_enabled(gradients):
            for k in range(0, len(self.places), directions):
                if k and between is not None:
                    x = between.normalize(k // directions - 1, x, lengths)
                outputs = []
                for n in range(k, k + directions):
                    tape: list[Step] = []
                    weights = weights_of(module, f"_{self.places[n]}")
                    result = recurrence(
                        x,
                        states[0][n],
                        states[1][n] if len(states) > 1 else None,
                        Weights(*(None if w is None else w.detach().requires_grad_() for w in weights)),  # type: ignore[arg-type]
                        config,
                        lengths=lengths,
                        reset=call.reset(module.batch_first, steps),
                        reverse=n > k,
                        running=None if running is None else running[n],
                        tape=tape,
                    )
                    tapes.append(tape)
                    finals.append([result.h] if result.c is None else [result.h, result.c])
                    outputs.append(result.output)
                output = torch.cat(outputs, -1)
                x = output if between is None else between.add_input(k // directions, output, x)
            upstream = gradients and call.upstream(
                module, x, [torch.stack(column) for column in zip(*finals, strict=True)]
            )
            hidden = [step.h for tape in tapes for step in tape]
            found: list[Tensor | None] = [None] * len(hidden)
            if isinstance(upstream, Tensor):
                found = list(torch.autograd.grad(upstream, hidden, allow_unused=True))
        own = call.output(module.batch_first)
        size = float(own.abs().max()) if own.numel() else 0.0
        error = float(((own - x.detach()) * valid[..., None]).abs().max()) / size if size else 0.0
        for place, tape in zip(self.places, tapes, strict=True):
            self.watches[place].add(tape, valid, found[: len(tape)])
            self.watches[place].error = max(self.watches[place].error, error)
            found = found[len(tape) :]

    def record(self) -> list[records.Recurrence]:
        # Dropout and zoneout draw at random, which the second computation leaves out.
        exact = not (self.module.dropout and self.module.num_layers > 1) and not self.config.zoneout
        shared = (
            self.config.norm == "batch"
            and self.config.statistics == "per_step"
            and getattr(self.module, "num_stat_steps", 0) == 1
        )
        return [w.record(place, shared, exact) for place, w in self.watches.items() if len(w.state.total)]


def description(module: RNNBase) -> Recurrence:
    """What a recurrent module computes."""
    own = getattr(module, "recurrence", None)
    if isinstance(own, Recurrence):
        return own
    if module.mode.startswith("RNN_"):
        return Recurrence("rnn", None, nonlinearity="tanh" if module.mode == "RNN_TANH" else "relu")
    return Recurrence("lstm" if module.mode == "LSTM" else "gru", None)


class Call:
    """One call of a recurrent module: what went in, what came out, and the gradients that arrived there."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Any, Any]) -> None:
        self.input = args[0] if args else kwargs["input"]
        self.hx = args[1] if len(args) > 1 else kwargs.get("hx")
        self.kwargs = kwargs
        output, state = result
        self.result = output
        self.parts = [output.data if isinstance(output, PackedSequence) else output]
        self.parts += list(state) if isinstance(state, tuple) else [state]
        self.gradients: list[Tensor | None] = [None] * len(self.parts)
        for k, part in enumerate(self.parts):
            if part.requires_grad:
                part.register_hook(functools.partial(self._arrived, k))

    def _arrived(self, k: int, gradient: Tensor | None) -> None:
        if gradient is None:  # an output that the loss does not use
            return
        before = self.gradients[k]
        self.gradients[k] = gradient.detach() if before is None else before + gradient.detach()

    def padded(self, batch_first: bool) -> tuple[Tensor, Tensor | None]:
        """The input as (T, B, I), and the lengths (B,) if there are any."""
        if isinstance(self.input, PackedSequence):
            unpacked, sizes = pad_packed_sequence(self.input)
            return unpacked, sizes.to(unpacked.device)
        lengths = self.kwargs.get("lengths")
        x = self._steps_first(self.input, batch_first)
        return x, None if lengths is None else torch.as_tensor(lengths, device=x.device).reshape(-1).long()

    def _steps_first(self, x: Tensor, batch_first: bool) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if batch_first else x

    def states(self, module: RNNBase, x: Tensor) -> list[Tensor]:
        count = module.num_layers * (1 + module.bidirectional)
        if self.hx is not None:
            given = list(self.hx) if isinstance(self.hx, (tuple, list)) else [self.hx]
            return [(s if s.dim() == 3 else s.unsqueeze(1)).detach() for s in given]
        sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
        return [x.new_zeros(count, x.shape[1], size) for size in sizes]

    def reset(self, batch_first: bool, steps: int) -> Tensor | None:
        reset: Tensor | None = self.kwargs.get("reset")
        if reset is None or reset.dim() == 1:
            return None if reset is None else reset.unsqueeze(1)
        return reset.transpose(0, 1) if batch_first and not isinstance(self.input, PackedSequence) else reset

    def output(self, batch_first: bool) -> Tensor:
        """The layer's own output, (T, B, H)."""
        return self._like_output(self.parts[0].detach(), batch_first)

    def _like_output(self, data: Tensor, batch_first: bool) -> Tensor:
        if isinstance(self.result, PackedSequence):
            return pad_packed_sequence(self.result._replace(data=data))[0]
        return self._steps_first(data, batch_first)

    def upstream(self, module: RNNBase, output: Tensor, finals: list[Tensor]) -> Tensor | None:
        """Sum of <gradient that arrived, value> over output and final states: its gradient is the loss's."""
        terms = []
        for k, (gradient, value) in enumerate(zip(self.gradients, [output, *finals], strict=False)):
            if gradient is None:
                continue
            if k == 0:
                gradient = self._like_output(gradient, module.batch_first)
            elif gradient.dim() == 2:
                gradient = gradient.unsqueeze(1)
            terms.append((gradient.to(value.dtype) * value).sum())
        return torch.stack(terms).sum() if terms else None

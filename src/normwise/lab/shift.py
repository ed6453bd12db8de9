"""Internal covariate shift: what one update of the layers before does to a layer's gradient and to its inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normwise.lab.tasks import Batch, Task
from normwise.lab.watch import weights
from normwise.measure.axes import by_axis
from normwise.measure.shift import Replay, StepShift, evenly_spread, parameters_in_order

LAYERS = 3
TAKE_FEATURES = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Shift:
    """Made between ``backward`` and the optimizer's step of one batch; ``after_update`` then measures, for each of
    up to ``LAYERS`` weights W_i, evenly spread and without the first, on which nothing acts:

    - ``shift/gradient/LAYER``, ``shift/cosine/LAYER``: `measure.shift.gradient_change`, where G is the gradient of the
      batch's loss with respect to W_i before the update, and G' the same with the layers before i updated and the
      others, i included, as they were;
    - ``shift/inputs/LAYER``: `measure.shift.input_shift`, of what the layer gets, over the batch and its positions.
      For layers that are linear maps or convolutions.

    All in train mode, with the same random numbers in every pass; running statistics, weights and random state are put
    back.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Batch) -> None:
        replay = Replay(model, lambda: task.loss(task.forward(model, batch), batch))
        order = parameters_in_order(replay)
        found, modules = weights(model), dict(model.named_modules())
        layers = evenly_spread([name for name in order if name in found], LAYERS)
        # Computed again, not read from `.grad`: G and G' must come from the same random numbers and running statistics.
        _, gradients = replay.gradients({name: found[name] for name in layers})
        self.owners = {name: modules[name.rpartition(".")[0]] for name in layers}
        self.shift = StepShift(
            replay,
            [[name] for name in order],
            gradients,
            {name: [name] for name in layers if name in gradients},
            {name: owner for name, owner in self.owners.items() if isinstance(owner, TAKE_FEATURES)},
            self._inputs,
        )

    def after_update(self) -> dict[str, float]:
        """The series by name. A layer without a gradient, or whose gradient is 0, has none."""
        found = {f"shift/inputs/{name}": value for name, value in self.shift.of_inputs().items()}
        for name, (change, cosine) in self.shift.of_gradients().items():
            found[f"shift/gradient/{name}"], found[f"shift/cosine/{name}"] = change, cosine
        return found

    def _inputs(self, name: str, args: tuple[Any, ...], _: dict[str, Any]) -> Tensor:
        return by_axis(args[0], -1 if isinstance(self.owners[name], nn.Linear) else 1)

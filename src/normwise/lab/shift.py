"""Internal covariate shift: what one update of the layers before does to a layer's gradient and to its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normwise.backends.reference import shift as reference
from normwise.lab.tasks import Batch, Task
from normwise.lab.watch import unchanged, weights

LAYERS = 3
TAKE_FEATURES = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Shift:
    """Made between ``backward`` and the optimizer's step of one batch; ``after_update`` then measures, for each of
    up to ``LAYERS`` weights W_i, evenly spread and without the first, on which nothing acts:

    - ``shift/gradient/LAYER``, ``shift/cosine/LAYER``: `reference.shift.changed`, where G is the gradient of the
      batch's loss with respect to W_i before the update, and G' the same with the layers before i updated and the
      others, i included, as they were;
    - ``shift/inputs/LAYER``: `reference.shift.moved`, of what the layer gets, over the batch and its positions. For
      layers that are linear maps or convolutions.

    All in train mode; running statistics, weights and random state are put back.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Batch) -> None:
        self.model, self.task, self.batch = model, task, batch
        self.before = [parameter.detach().clone() for parameter in model.parameters()]
        self.layers = reference.spread(list(weights(model)), LAYERS)
        found = dict(model.named_parameters())
        self.gradients = {
            name: grad.flatten().clone() for name in self.layers if (grad := found[name].grad) is not None
        }
        self.inputs = self._inputs()

    def after_update(self) -> dict[str, float]:
        """The series by name. A layer without a gradient, or whose gradient is 0, has none."""
        found = {}
        now = self._inputs()
        for name, values in self.inputs.items():
            found[f"shift/inputs/{name}"] = reference.moved(values, now[name])
        for name, gradient in self._moved().items():
            change = reference.changed(self.gradients[name], gradient)
            if change is not None:
                found[f"shift/gradient/{name}"], found[f"shift/cosine/{name}"] = change
        self.gradients.clear()
        return found

    @torch.no_grad()
    def _inputs(self) -> dict[str, Tensor]:
        """What the layers get, (features, values)."""
        seen: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        hooks = []
        for name in self.layers:
            module = modules[name.rpartition(".")[0]]
            if isinstance(module, TAKE_FEATURES):
                axis = -1 if isinstance(module, nn.Linear) else 1

                def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name, axis: int = axis) -> None:
                    seen[name] = args[0].detach().movedim(axis, 0).flatten(1).clone()

                hooks.append(module.register_forward_pre_hook(keep))
        try:
            with unchanged(self.model, training=True):
                self.task.forward(self.model, self.batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: seen[name] for name in self.layers if name in seen}

    def _moved(self) -> dict[str, Tensor]:
        """G' of each layer: from the last to the first, ever more of the net is set back to before the update."""
        parameters = dict(self.model.named_parameters())
        names, updated = list(parameters), [parameter.detach().clone() for parameter in parameters.values()]
        found, back_from = {}, len(names)
        try:
            for layer in reversed([name for name in self.layers if name in self.gradients]):
                first = names.index(layer)
                with torch.no_grad():
                    for place in range(first, back_from):
                        parameters[names[place]].copy_(self.before[place])
                back_from = first
                with unchanged(self.model, training=True), torch.enable_grad():
                    loss = self.task.loss(self.task.forward(self.model, self.batch), self.batch)
                    (gradient,) = torch.autograd.grad(loss, parameters[layer])
                found[layer] = gradient.flatten()
        finally:
            with torch.no_grad():
                for name, value in zip(names, updated, strict=True):
                    parameters[name].copy_(value)
        return {name: found[name] for name in self.layers if name in found}

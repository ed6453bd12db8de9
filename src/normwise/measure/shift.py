"""Internal covariate shift, two ways: how an update moves a layer's inputs, and how it changes its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normwise.measure.gradients import loss_and_gradients
from normwise.measure.snapshot import RandomState, Values, random_state_kept, state_kept, state_of

Layer = TypeVar("Layer")
# The input of a layer from the arguments of a call, laid out as (features, values); None where it has no features.
Inputs = Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor | None]


def input_shift(before: Tensor, after: Tensor) -> float:
    """How far the distribution of each feature moved: Wasserstein-1 distance over the standard deviation before.

    Args:
        before, after: (features, values), in any order of the values.

    Returns:
        The mean over the features, those left out that are constant; 0 if all are.

    Source: the shift of inputs that Ioffe & Szegedy 2015, section 2, speak of; the measure is ours.
    """
    std = before.std(dim=1, correction=0)
    distance = (before.sort(dim=1).values - after.sort(dim=1).values).abs().mean(dim=1)
    varying = std > 1e-6
    return float((distance[varying] / std[varying]).mean()) if bool(varying.any()) else 0.0


def gradient_change(before: Tensor, after: Tensor) -> tuple[float, float] | None:
    """(|G' - G| / |G|, cosine between G and G') of a layer's gradient G and what it is after the layers before it took
    their step, G'; None where G is 0.

    Divided by |G|, because norms change the size of gradients.

    Args:
        before, after: G and G', (values,).

    Source: Santurkar et al. 2018, definition 2.1.
    """
    size = float(before.norm())
    if size == 0:
        return None
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    return float((after - before).norm()) / size, float(cosine)


def evenly_spread(layers: Sequence[Layer], most: int) -> list[Layer]:
    """Up to `most` of the layers in their order, evenly spread, without the first: no layer acts on its inputs."""
    later = list(layers)[1:]
    count = min(most, len(later))
    return [later[(place + 1) * len(later) // count - 1] for place in range(count)]


class Replay:
    """A batch's loss, recomputed from the random states and model state at construction.

    So dropout draws the same masks, and norms that read their running statistics in training read the same ones: passes
    differ only by changes of the weights. A pass leaves random states and the model's state
    (`snapshot.state_of`) as it found them.

    Args:
        model: in the mode in which it is to run.
        loss: runs the model on the batch; a scalar tensor.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.random, self.state = RandomState(), Values(state_of(model))

    def forward(self) -> None:
        """One forward pass, for hooks to observe."""
        with self._again(), torch.enable_grad():
            self.loss()

    def gradients(self, parameters: Mapping[str, nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
        """The loss and its gradients, as `loss_and_gradients`."""
        with self._again():
            return loss_and_gradients(self.loss, parameters)

    @contextmanager
    def _again(self) -> Iterator[None]:
        with random_state_kept(), state_kept(self.model):
            self.random.restore()
            self.state.restore()
            yield


class StepShift:
    """What one optimizer step does to layers: constructed before the step, queried after it.

    Args:
        replay: of the batch that the step is taken on.
        order: the names of the model's parameters in the order in which the forward uses them; those named together
            belong to one layer. Parameters without a place in it count as behind all layers.
        gradients: of the loss before the step, by the parameter's name.
        weights: for each layer whose gradient is followed, in that order, the names of its weights in `gradients`.
        modules: the layers whose inputs are followed.
        inputs: see `Inputs`. Only the first call of a pass counts.
    """

    def __init__(
        self,
        replay: Replay,
        order: Sequence[Sequence[str]],
        gradients: Mapping[str, Tensor],
        weights: Mapping[str, Sequence[str]],
        modules: Mapping[str, nn.Module],
        inputs: Inputs,
    ) -> None:
        self.replay, self.order, self.gradients, self.weights = replay, order, gradients, dict(weights)
        self.modules, self.inputs = modules, inputs
        self.parameters = dict(replay.model.named_parameters())
        self.before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.inputs_before = self._inputs()

    def of_inputs(self) -> dict[str, float]:
        """`input_shift` of each layer, by its name in `modules`."""
        before = self.inputs_before
        return {
            name: input_shift(before[name], now)
            for name, now in self._inputs().items()
            if name in before and before[name].shape == now.shape
        }

    def of_gradients(self) -> dict[str, tuple[float, float]]:
        """`gradient_change` of each layer, by its name in `weights`; a layer whose gradient was 0 has none.

        From the last layer to the first, more and more parameters are reset to their values before the step.
        """
        found: dict[str, tuple[float, float]] = {}
        updated = Values(self.parameters.values())
        placed = {name for names in self.order for name in names}
        try:
            self._set_back([name for name in self.parameters if name not in placed])
            behind = len(self.order)
            for layer, names in reversed(self.weights.items()):
                place = next(n for n, together in enumerate(self.order) if names[0] in together)
                for together in self.order[place:behind]:
                    self._set_back(together)
                behind = min(place, behind)
                _, now = self.replay.gradients({name: self.parameters[name] for name in names})
                if now:
                    old = torch.cat([self.gradients[name].flatten() for name in now]).double()
                    change = gradient_change(old, torch.cat([g.flatten() for g in now.values()]).double())
                    if change is not None:
                        found[layer] = change
        finally:
            updated.restore()
        return {layer: found[layer] for layer in self.weights if layer in found}

    def _inputs(self) -> dict[str, Tensor]:
        """Each layer's first input of a pass, (features, values)."""
        seen: dict[str, Tensor] = {}

        def hook_of(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name not in seen and (x := self.inputs(name, args, kwargs)) is not None:
                    seen[name] = x.detach().clone()

            return keep

        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
            self.replay.forward()
        return seen

    @torch.no_grad()
    def _set_back(self, names: Sequence[str]) -> None:
        for name in names:
            self.parameters[name].copy_(self.before[name])


def parameters_in_order(replay: Replay) -> list[str]:
    """The names of a model's parameters in the order in which a forward pass first calls their modules.

    Those of a module that is never called, such as an attention's output projection, which the attention uses itself,
    go with the module around it.
    """
    called: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        called.setdefault(module, len(called))

    modules = dict(replay.model.named_modules(remove_duplicate=False))
    with ExitStack() as hooks:
        for module in replay.model.modules():
            hooks.callback(module.register_forward_pre_hook(note).remove)
        replay.forward()

    def place(name: str) -> int:
        owner = name
        while owner:
            owner = owner.rpartition(".")[0]
            if modules[owner] in called:
                return called[modules[owner]]
        return len(called)

    return sorted((name for name, _ in replay.model.named_parameters()), key=place)

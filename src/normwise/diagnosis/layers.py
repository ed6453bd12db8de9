"""Which modules of a model are its layers, what each does, and which axes of their tensors mean what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, rnn

from normwise.diagnosis.batches import all_tensors
from normwise.diagnosis.distributions import Layout
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.records import Role
from normwise.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normwise.nn.frozen_batch_norm import FrozenBatchNorm
from normwise.surgery.norms import is_norm_name, stands_for
from normwise.surgery.select import instead_of_model

# torch's classes and, since this library's layers are subclasses of them, this library's too.
NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    "instance": (instancenorm._InstanceNorm,),
    "renorm": (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
    "batch": (batchnorm._NormBase,),
    "layer": (nn.LayerNorm,),
    "rms": (nn.RMSNorm,),
    "group": (nn.GroupNorm,),
    "frozen": (FrozenBatchNorm,),
}
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
RECURRENT = (rnn.RNNBase,)
CELLS = (rnn.RNNCellBase,)
NONLINEARITIES = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in ("MultiheadAttention", "RReLU")
)


class Named(NamedTuple):
    """A layer of the model before anything is known of it."""

    name: str
    module: nn.Module
    role: Role


def layers_of(model: nn.Module) -> list[Named]:
    """Modules that compute something themselves: known layers, those with own parameters, and the childless."""
    found: list[Named] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        role = role_of(module)
        children = [child for child_name, child in module.named_children() if child_name != "parametrizations"]
        if role != "other":
            # What is inside a known layer is a part of it: a parametrization, an attention's output projection.
            inside |= {id(part) for part in module.modules()}
            found.append(Named(name, module, role))
        elif not children or module._parameters:
            found.append(Named(name, module, role))
    return found


def role_of(module: nn.Module) -> Role:
    if norm_kind(module) is not None:
        return "norm"
    kinds: list[tuple[Role, tuple[type[nn.Module], ...]]] = [
        ("recurrent", (*RECURRENT, *CELLS)),
        ("conv", CONVOLUTIONS),
        ("linear", (nn.Linear, nn.Bilinear)),
        ("attention", (nn.MultiheadAttention,)),
        ("embedding", (nn.Embedding, nn.EmbeddingBag)),
        ("dropout", (dropout._DropoutNd, nn.RReLU)),
        ("nonlinearity", NONLINEARITIES),
    ]
    return next((role for role, classes in kinds if isinstance(module, classes)), "other")


def may_be_norm(named: Named, given: Sequence[int], returned: Sequence[int]) -> bool:
    """Whether a layer of an unknown class may be a norm: it has the name of one, and returns the shape that it gets.

    A name proposes and proves nothing: this is for saying that something was not looked at, not for judging it.
    """
    if named.role != "other" or isinstance(named.module, nn.Identity) or is_ours(named.module):
        return False
    if not given or list(given) != list(returned):
        return False
    return is_norm_name(f"{type(named.module).__name__} {named.name.rpartition('.')[2]}")


def norm_kind(module: nn.Module) -> str | None:
    """ "batch", "renorm", "instance", "layer", "rms", "group", "frozen", or None for what is no norm layer.

    A layer of any class is what it computes: see `normwise.surgery.norms`.
    """
    norm = norm_of(module)
    return next((kind for kind, classes in NORMS.items() if isinstance(norm, classes)), None)


def norm_of(module: nn.Module) -> nn.Module:
    """The norm of torch.nn or normwise that a layer is, or the one that computes the same with its tensors; any other
    module itself."""
    return stands_for(module) or module


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "normwise"


def unwrapped(model: nn.Module) -> tuple[nn.Module, str | None]:
    """The eager model inside what compiles or spreads it, and the class of the outermost that spreads it.

    Raises:
        DiagnosisError: no module, or one that cannot be looked into as it is.
    """
    if not isinstance(model, nn.Module):
        raise DiagnosisError(f"model must be a torch.nn.Module, but got {instead_of_model(model)}")
    wrapper: str | None = None
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            inner = None
            if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                inner, wrapper = model.module, wrapper or type(model).__name__
        if inner is None:
            break
        model = inner
    for name, module in model.named_modules():
        what = f"layer {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise DiagnosisError(f"{what} is a ScriptModule, whose inside hooks cannot reach: give the eager model")
        if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            raise DiagnosisError(f"{what} is sharded by FSDP: diagnose the model before it is wrapped")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise DiagnosisError(
                f"parameter {name!r} is not initialized yet (a lazy module): run model(inputs) on one batch first, "
                "then diagnose"
            )
        if tensor.is_meta:
            raise DiagnosisError(
                f"parameter {name!r} is on the meta device and holds no numbers: load the weights first "
                "(model.to_empty(device='cpu'), then load_state_dict)"
            )
    return model, wrapper


class Layouts:
    """Says which axis of a tensor holds features, samples, time: by the layer, else by where the tensor came from."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.known: dict[tuple[int, ...], Layout] = {}

    def of(self, module: nn.Module, role: Role, x: Tensor) -> Layout:
        """Of a layer's input or output `x`; what an elementwise layer gets was the last of its shape."""
        shape, rank = tuple(x.shape), x.dim()
        if rank == 0:
            return Layout()
        if role == "norm":
            feature = (
                1 if norm_kind(module) in ("batch", "renorm", "instance", "group", "frozen") and rank > 1 else rank - 1
            )
            dim = getattr(norm_of(module), "dim", None)
            feature = dim % rank if isinstance(dim, int) else feature
        elif role == "conv":
            feature = max(0, rank - 1 - len(module.kernel_size))  # type: ignore[arg-type]
        elif role in ("linear", "recurrent", "attention", "embedding"):
            feature = rank - 1
        elif shape in self.known:
            return self.known[shape]
        else:
            feature = 1 if rank >= 4 or rank == 2 else rank - 1
        layout = self._complete(module, feature, shape)
        self.known[shape] = layout
        return layout

    def _complete(self, module: nn.Module, feature: int, shape: tuple[int, ...]) -> Layout:
        others = [axis for axis in range(len(shape)) if axis != feature]
        if len(others) != 2:
            return Layout(feature, others[0] if others else None)
        first, second = others
        batch_first = getattr(module, "batch_first", None)
        if batch_first is None:
            # A layer that does not say takes the axis of the batch's size; samples come first where both have it.
            before = [known for size, known in self.known.items() if len(size) == 3 and known.sample is not None]
            turned = shape[first] != self.samples and shape[second] == self.samples
            if shape[first] == shape[second] == self.samples and before:
                turned = (before[-1].sample or 0) > (before[-1].time or 0)
            batch_first = not turned
        return Layout(feature, first, second) if batch_first else Layout(feature, second, first)


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A layer's parameters, with those of the parts inside it: a parametrization, an attention's output projection."""
    return list(module.named_parameters(recurse=role_of(module) != "other"))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The floating tensors among a hook's arguments, in tuples, mappings and dataclasses too."""
    return (tensor for tensor in all_tensors(value) if tensor.is_floating_point())

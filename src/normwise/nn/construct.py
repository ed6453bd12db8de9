"""What layers share, whatever they normalize."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn


class NotScripted(nn.Module):
    """A layer that torch.jit.script refuses in words that say so."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Asked for by torch.jit.script, of every module of a model."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.compile or torch.export, or "
            "torch.jit.trace, of a model that holds normwise's layers"
        )


class Activated(NotScripted):
    """A norm layer that ends in an activation, or not: `act` names it.

    torch.nn's namesakes have no activation, and what takes layers apart knows theirs: torch.nn.SyncBatchNorm.
    convert_sync_batchnorm, torch.nn.utils.fusion, the fast path of nn.TransformerEncoderLayer and those that freeze or
    fuse layers elsewhere read the tensors and `eps` of whatever is an instance of them, and would leave the activation
    out. They find no `eps` where there is one; nor where the weight is not the gain, but what an `offset` is added to.
    """

    act: str | None = None
    __constants__: ClassVar[list[str]] = []  # what torch.jit.trace reads of a layer: torch.nn names eps

    @property
    def eps(self) -> Any:
        """What is added to the variance. RuntimeError where the layer has an activation or an offset."""
        if self.act is not None:
            raise RuntimeError(
                f"{type(self).__name__} with act={self.act!r} hides its eps from code that may leave the activation "
                "out (torch.nn.SyncBatchNorm.convert_sync_batchnorm, fuse_conv_bn_eval and others would): use "
                "normwise.convert, fold or freeze, or take the activation out first (layer.act = None) and put a "
                "module of torch.nn behind the layer. The number is in vars(layer)['eps']"
            )
        if offset_of(self):
            raise RuntimeError(
                f"{type(self).__name__} with offset={offset_of(self)} hides its eps from code that may take the weight "
                "for the gain (torch.nn.TransformerEncoderLayer in evaluation and others would): use normwise.convert "
                "or fold, or put offset + weight into the weight of a layer without an offset. The number is in "
                "vars(layer)['eps']"
            )
        return self.__dict__["eps"]

    @eps.setter
    def eps(self, value: float | None) -> None:
        self.__dict__["eps"] = value

    def __dir__(self) -> list[str]:
        """Without the eps that is not given away: torch.jit.trace and inspect.getmembers look at all there is."""
        return [name for name in super().__dir__() if name != "eps" or (self.act is None and not offset_of(self))]


def eps_of(layer: nn.Module) -> Any:
    """The `eps` of any layer, for those who mind its activation; None where it has none."""
    return vars(layer)["eps"] if isinstance(layer, Activated) else getattr(layer, "eps", None)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in the input of a norm of channels: 1 but for ours with a `dim`."""
    if not isinstance(layer, Activated) or isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return 1
    return getattr(layer, "dim", 1)


def offset_of(layer: nn.Module) -> float:
    """What the layer adds to its weight for its gain: 0 but for our LayerNorm and RMSNorm with an `offset`."""
    is_ours = isinstance(layer, Activated) and isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    return float(getattr(layer, "offset", 0.0)) if is_ours else 0.0


def gain_of(layer: nn.Module) -> Tensor | None:
    """The layer's gain, which its weight is but for an offset; None where it has none."""
    weight: Tensor | None = getattr(layer, "weight", None)
    offset = offset_of(layer)
    # In float64, where a sum keeps all digits of a weight of any other dtype that matter beside the offset.
    return weight if weight is None or not offset else weight.double() + offset


def affine_without_bias(layer: nn.Module, drop: bool) -> None:
    """Take the bias out of a layer that its torch.nn parent built with one (torch before 2.13 knows no `bias=`)."""
    if drop:
        layer.register_parameter("bias", None)


def reset_affine(layer: nn.Module) -> None:
    """Gain 1 and bias 0, where the layer has them: the layer then only standardizes."""
    for name, value in (("weight", 1.0 - offset_of(layer)), ("bias", 0.0)):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            nn.init.constant_(parameter, value)


def affine(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The layer's gain and bias, or what stands in for them (torch.nn.utils.parametrize makes properties of them).

    nn.Module's own look-up takes as long as a small norm, so parameters that are just that are read past it.
    """
    parameters = layer.__dict__["_parameters"]
    weight = parameters["weight"] if "weight" in parameters else getattr(layer, "weight", None)
    bias = parameters["bias"] if "bias" in parameters else getattr(layer, "bias", None)
    return weight, bias

"""What layers share, whatever they normalize."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import nn


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
    out. They find no `eps` where there is one.
    """

    act: str | None = None
    __constants__: ClassVar[list[str]] = []  # what torch.jit.trace reads of a layer: torch.nn names eps

    @property
    def eps(self) -> Any:
        """What is added to the variance. RuntimeError where the layer has an activation."""
        if self.act is not None:
            raise RuntimeError(
                f"{type(self).__name__} with act={self.act!r} gives its eps to nobody who may leave the activation out "
                "(torch.nn.SyncBatchNorm.convert_sync_batchnorm, fuse_conv_bn_eval and others would): use "
                "normwise.convert, fold or freeze, or take the activation out first (layer.act = None) and put a "
                "module of torch.nn behind the layer. The number is in vars(layer)['eps']"
            )
        return self.__dict__["eps"]

    @eps.setter
    def eps(self, value: float | None) -> None:
        self.__dict__["eps"] = value

    def __dir__(self) -> list[str]:
        """Without the eps that is not given away: torch.jit.trace and inspect.getmembers look at all there is."""
        return [name for name in super().__dir__() if name != "eps" or self.act is None]


def eps_of(layer: nn.Module) -> Any:
    """The `eps` of any layer, for those who mind its activation; None where it has none."""
    return vars(layer)["eps"] if isinstance(layer, Activated) else getattr(layer, "eps", None)


def affine_without_bias(layer: nn.Module, drop: bool) -> None:
    """Take the bias out of a layer that its torch.nn parent built with one (torch before 2.13 knows no `bias=`)."""
    if drop:
        layer.register_parameter("bias", None)


def reset_affine(layer: nn.Module) -> None:
    """Gain 1 and bias 0, where the layer has them: the layer then only standardizes."""
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            nn.init.constant_(parameter, value)

"""What stands between the layers of a recurrent stack beside dropout: a norm, and residual connections."""

from typing import Literal, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from normwise.backends.protocol import Layout, RecurrenceRequest
from normwise.backends.reference.sequences import valid_steps
from normwise.ops.norm.layer_norm import layer_norm, rms_norm

BetweenNorm: TypeAlias = Literal["layer", "rms"]


class Between(NamedTuple):
    """A norm between layers, residual connections, or both: with y_k the output of layer k and x_k its input,

        y_k = layer_k(x_k) (+ x_k from the second layer on, if `residual`)
        x_(k+1) = dropout(norm(y_k))

    Attributes:
        norm: of the features of one row; None: none.
        gains, biases: of the norm of each layer's output but the last's; RMS norm has no biases.
        residual: add its input to each layer's output, where both are of one width by construction.
    """

    norm: BetweenNorm | None = None
    gains: tuple[Tensor, ...] = ()
    biases: tuple[Tensor | None, ...] = ()
    residual: bool = False

    def add_input(self, layer: int, output: Tensor, x: Tensor) -> Tensor:
        """The output of `layer` with its input x added, if it is to be."""
        return output + x if self.residual and layer else output

    def normalize(self, layer: int, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The norm of the output of `layer`, in any of the forms of `Layout`; padding, which there is only where there
        are `lengths`, stays 0, and no bias gets there."""
        if self.norm is None:
            return output
        gain, bias = self.gains[layer], self.biases[layer]
        mask = None if lengths is None else valid_steps(len(output), lengths)
        if self.norm == "layer":
            return layer_norm(output, gain.shape, gain, bias, mask=mask)  # type: ignore[no-any-return]
        return rms_norm(output, gain.shape, gain, mask=mask)  # type: ignore[no-any-return]


def next_input(request: RecurrenceRequest, between: Between | None, layer: int, output: Tensor) -> Tensor:
    """What comes of the output of `layer` on its way into the next."""
    layout: Layout = request.layout
    if between is not None:
        output = between.normalize(layer, output, layout.lengths)
    return F.dropout(output, request.dropout) if request.training and request.dropout else output

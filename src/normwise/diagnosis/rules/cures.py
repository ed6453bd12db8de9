"""Lines of code that cure a finding in the model as it is, from the numbers of a diagnosis alone.

A line has its effect when it is run as printed, on `model` as it was given: the tests run each. Where the numbers do
not say enough for a line (which axis has the features, say), there is none, and the cure is words.
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.diagnosis.records import Diagnosis, Layer

INSIDE = "model, _ = normwise.convert(model, recurrent='layer')"

# Half of what counts as large, `transformers.LARGE`.
WITHIN = 50.0

TEXTS = {
    "saturated": "a norm before the nonlinearity, such as normwise.LayerNorm{line}; or smaller initial weights",
    "dead": "a norm before the nonlinearity, such as normwise.LayerNorm{line}; or a smaller learning rate",
    "gates": f"a norm inside the recurrence: {INSIDE}; or smaller initial weights",
    "depth": "a norm in each block (normwise.LayerNorm or BatchNorm) and a skip around it, y = x + block(norm(x))"
    "{line}",
    "time": f"a norm inside the recurrence: {INSIDE}; for an LSTM also forget_bias=1.0",
    "stack": "put normwise.BatchNorm2d or normwise.LayerNorm behind each layer with weights{line}",
    "recurrent stack": f"a norm inside the recurrence: {INSIDE}",
    "inside": "build it as normwise.LSTM with norm='layer', or norm='batch' with num_stat_steps= the longest sequence, "
    "which keeps statistics for each step; or a normwise.LayerNorm in its place{line}",
    "shared": "build it with norm='layer', to which steps are no matter, or with num_stat_steps= the longest sequence, "
    "which keeps statistics for each step",
    "lengths": "call the layer with norm(x, lengths=lengths) of normwise's, or take a norm whose statistics are per "
    "sample: model, _ = normwise.convert(model, to='group')",
}


def text(which: str, line: str | None = None) -> str:
    """One of `TEXTS`, with the line if there is one."""
    return TEXTS[which].format(line="" if line is None else f"; in the model as it is {line}")


def without_bias(source: Layer, norm: Layer) -> str:
    """The bias is taken out, and of the running mean, which has it in it: outputs stay as they are in both modes."""
    first, second = (f"model.get_submodule({layer.name!r})" for layer in (source, norm))
    if norm.norm is None or norm.norm.running is None:
        return f"{first}.bias = None"
    return f"layer, norm = {first}, {second}; norm.running_mean -= layer.bias.data; layer.bias = None"


def norm_before(layer: Layer) -> str | None:
    """A LayerNorm in front of a nonlinearity."""
    if not layer.name or layer.input is None or layer.units is None:
        return None
    norm = _layer_norm(layer.input.shape, layer.units.units)
    if norm is None:
        return None
    return f"model.set_submodule({layer.name!r}, torch.nn.Sequential({norm}, model.get_submodule({layer.name!r})))"


def norm_in_place(layer: Layer) -> str | None:
    """A LayerNorm where another norm is."""
    if not layer.name or layer.input is None or len(layer.input.shape) != 2:
        return None
    return f"model.set_submodule({layer.name!r}, normwise.LayerNorm({layer.input.shape[-1]}))"


def norms_behind(diagnosis: Diagnosis, stack: Sequence[Layer]) -> str | None:
    """A norm behind each layer of a stack but the last, its head, where there are none yet and the layers are alike."""
    if any(layer.role == "norm" or layer.may_be_norm for layer in diagnosis.layers):
        return None
    names = tuple(layer.name for layer in stack[:-1])
    kinds = {layer.kind for layer in stack[:-1]}
    behind = {
        "Linear": "normwise.LayerNorm({of}.out_features)",
        **{f"Conv{n}d": f"normwise.BatchNorm{n}d({{of}}.out_channels)" for n in (1, 2, 3)},
    }
    if len(kinds) != 1 or not kinds <= behind.keys() or "" in names:
        return None
    layer = "model.get_submodule(name)"
    norm = behind[kinds.pop()].format(of=layer)
    return f"for name in {names!r}: model.set_submodule(name, torch.nn.Sequential({layer}, {norm}))"


def _layer_norm(shape: Sequence[int], features: int) -> str | None:
    """Over the axis of the features, where the shape says which that is."""
    last, second = shape[-1] == features, len(shape) > 2 and shape[1] == features
    if last == second:
        return None
    return f"normwise.LayerNorm({features})" if last else f"normwise.LayerNorm({features}, dim=1)"


def smaller_queries_and_keys(layer: Layer, spread: float) -> str | None:
    """The weights of queries and keys of an nn.MultiheadAttention scaled so that its logits lie within `WITHIN` of
    their row's mean, once, as QK-Clip does after each step (Kimi Team 2025, section 2.1)."""
    weights = layer.gradient.weights if layer.gradient is not None else {}
    if not layer.name or "in_proj_weight" not in weights:
        return None
    factor = (WITHIN / spread) ** 0.5
    scaled = [f"a.{name}.data[: 2 * a.embed_dim] *= {factor:.2g}" for name in weights if name.startswith("in_proj_")]
    return "; ".join([f"a = model.get_submodule({layer.name!r})", *scaled])

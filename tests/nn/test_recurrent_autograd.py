"""What autograd may ask of a recurrent layer, as of torch.nn's: tensors changed in place, checkpointing, saved-tensor
hooks, several backward calls, batches of gradients, forward-mode derivatives and torch.func."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import normwise
from benchmarks.held import beside_saved
from normwise.backends.cpu import library
from normwise.ops.rnn.presets import PRESETS
from support.recurrent_cases import CELLS, LAYERS
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 3, 4, 6
VARIANTS = [
    (cell, {"norm": norm, "variant": name})
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    for norm in (("batch",) if config.norm == "batch" else ("layer", "rms"))
] + [(cell, {"norm": None}) for cell in LAYERS]
# Layers that the kernels run, one of each way in which they keep what the backward needs.
KERNELS = [
    ("lstm", {}),
    ("lstm", {"norm": None}),
    ("gru", {}),
    ("gru", {"norm": None, "num_layers": 2}),
    ("rnn", {"bidirectional": True}),
    ("rnn", {"norm": None, "nonlinearity": "relu"}),
    ("lstm", {"dtype": torch.bfloat16}),
    ("gru", {"dtype": torch.bfloat16}),
]
LOOPS = [("lstm", {"proj_size": 2}), ("gru", {"zoneout": 0.3}), ("rnn", {"norm": "batch"}), ("lstm", {"norm": "batch"})]
CHANGED_IN_PLACE = "has been modified by an inplace operation"
NEEDS_KERNELS = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def name_of(value: Any) -> str:
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def build(cell: str, options: dict[str, Any]) -> nn.Module:
    return LAYERS[cell](INPUT, HIDDEN, **options)


def parts(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def twice(t: Tensor, change: str) -> Tensor:
    """2 * t: in place behind autograd's back (whose result then counts as t), in place before its eyes, or aside."""
    if change == "aside":
        return 2 * t
    with torch.set_grad_enabled(change == "seen"):
        t.mul_(2)
    return t


def differentiate(layer: nn.Module, inputs: list[Tensor], which: str, change: str | None) -> list[Tensor] | str:
    """Gradients of inputs and weights, where the tensor `which` is changed before the backward; or the error."""
    torch.manual_seed(0)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    used = {name: w * 1 for name, w in weights.items()}
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, *states = (t * 1 for t in leaves)
    given = tuple(states) if len(states) == 2 else states[0]
    output, after = torch.func.functional_call(layer, used, (x, given))
    found = {"x": x, "h0": states[0], "weight_hh_l0": used["weight_hh_l0"], "output": output}
    found |= dict(zip(("h", "c"), parts(after), strict=False))
    upstream = {name: torch.randn_like(found[name]) for name in ("output", "h")}
    if change in ("seen", "aside"):
        found[which] = twice(found[which], change)
    loss = sum((found[name] * u).sum() for name, u in upstream.items())
    if change == "unseen":
        twice(found[which], change)
    try:
        return list(torch.autograd.grad(loss, [*leaves, *weights.values()]))
    except RuntimeError as error:
        return str(error)


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, kind="composed", count=T * B, scale=max(1.0, b.abs().max().item()))


def inputs_of(cell: str, options: dict[str, Any]) -> list[Tensor]:
    dtype, count = options.get("dtype"), options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    shape = (B, T, INPUT) if options.get("batch_first") else (T, B, INPUT)
    return [torch.randn(shape, dtype=dtype)] + [
        torch.randn(count, B, size, dtype=dtype)
        for size in ([options.get("proj_size", HIDDEN), HIDDEN] if cell == "lstm" else [HIDDEN])
    ]


@NEEDS_KERNELS
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 2}, {"dtype": torch.bfloat16}],
    ids=["one layer", "batch first", "bidirectional", "two layers", "bfloat16"],
)
@pytest.mark.parametrize("cell", LAYERS)
def test_tensors_changed_in_place_as_with_torchs_layer(cell: str, options: dict[str, Any]) -> None:
    """Right gradients or torch's error, and right ones wherever torch.nn allows the change of a result."""
    theirs = getattr(nn, cell.upper())(INPUT, HIDDEN, **options)
    ours = LAYERS[cell].from_torch(theirs, norm=None)
    inputs = inputs_of(cell, options)
    with normwise.backend("cpu"):
        for change, expected in (("unseen", None), ("seen", "aside")):
            for which in ("output", "h", "x", "h0", "weight_hh_l0") if change == "unseen" else ("output", "h"):
                got, torchs = (differentiate(layer, inputs, which, change) for layer in (ours, theirs))
                if isinstance(got, str):
                    assert "modified" in got
                    # torch copies an input that is batch first, which costs memory.
                    assert isinstance(torchs, str) or which == "x"
                    if which == "output":
                        assert cell == "lstm"
                else:
                    same(got, differentiate(ours, inputs, which, expected))  # type: ignore[arg-type]


@pytest.mark.parametrize(("cell", "options"), VARIANTS + LOOPS, ids=name_of)
def test_a_changed_output_raises_or_changes_no_gradient(cell: str, options: dict[str, Any]) -> None:
    layer, inputs = build(cell, options), inputs_of(cell, options)
    for which in ("output", "h") if cell != "lstm" else ("output", "h", "c"):
        for change, expected in (("unseen", None), ("seen", "aside")):
            got = differentiate(layer, inputs, which, change)
            if isinstance(got, str):
                assert (cell, which) == ("lstm", "output"), got
                assert CHANGED_IN_PLACE in got
            else:
                same(got, differentiate(layer, inputs, which, expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True], ids=["lengths", "packed"])
@pytest.mark.parametrize("cell", LAYERS)
def test_outputs_of_sequences_of_different_lengths_may_be_changed(cell: str, packed: bool) -> None:
    layer, x, lengths = build(cell, {}), torch.randn(T, B, INPUT), torch.tensor([5, 2, 4])
    upstream = torch.randn(int(lengths.sum()), HIDDEN) if packed else torch.randn(T, B, HIDDEN)
    found = []
    for change in (twice, lambda t, _: 2 * t):
        if packed:
            output = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data
        else:
            output = layer(x, lengths=lengths)[0]
        found.append(torch.autograd.grad(change(output, "seen"), list(layer.parameters()), upstream))
    same(*found)


@pytest.mark.parametrize(
    "change",
    [
        lambda out, x: out.add_(x),
        lambda out, x: F.relu_(out),
        lambda out, x: nn.Dropout(0.5, inplace=True)(out),
        lambda out, x: out.masked_fill_(x > 1, 0),
        lambda out, x: out.index_put_((torch.tensor([1]),), x[0]),
        lambda out, x: out[1:].mul_(x[1:]),
    ],
    ids=["skip", "relu", "dropout", "mask", "index", "slice"],
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_what_is_done_to_an_output_in_place(cell: str, batch_first: bool, change: Callable[..., Tensor]) -> None:
    layer = LAYERS[cell](HIDDEN, HIDDEN, batch_first=batch_first)
    x, upstream, found = torch.randn(T, B, HIDDEN), torch.randn(T, B, HIDDEN), []
    for copied in (False, True):
        torch.manual_seed(0)
        output, _ = layer(x)
        output = output.clone() if copied else output
        change(output, x)
        found.append(torch.autograd.grad(output, list(layer.parameters()), upstream))
    same(*found)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", None])
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_a_cell_may_be_changed_where_torchs_allows_it(cell: str, norm: str | None) -> None:
    ours = CELLS[cell](INPUT, HIDDEN, norm=norm, num_stat_steps=1)
    theirs = getattr(nn, f"{cell.upper()}Cell")(INPUT, HIDDEN)
    x, upstream = torch.randn(B, INPUT), torch.randn(B, HIDDEN)

    def after(layer: nn.Module, which: int, change: str) -> Any:
        states = parts(layer(x))
        states[which] = twice(states[which], change)
        try:
            return torch.autograd.grad(sum((s * upstream).sum() for s in states), list(layer.parameters()))
        except RuntimeError as error:
            return str(error)

    for which in range(2 if cell == "lstm" else 1):
        got = after(ours, which, "seen")
        if isinstance(got, str):
            assert norm is None
            assert isinstance(after(theirs, which, "seen"), str)
        else:
            same(got, after(ours, which, "aside"))


@pytest.mark.parametrize("cell", LAYERS)
def test_buffers_of_lengths_and_resets_may_be_filled_anew(cell: str) -> None:
    layer, x = build(cell, {}), torch.randn(T, B, INPUT)
    lengths, reset, found = torch.tensor([5, 2, 4]), torch.rand(T, B) < 0.3, []
    upstream = torch.randn(T, B, HIDDEN)
    for options in ({"reset": reset}, {"reset": reset, "lengths": lengths}):
        for change in (False, True):
            given = {name: t.clone() for name, t in options.items()}
            output, _ = layer(x, **given)
            if change and library.missing() is None:
                given["reset"].logical_not_()
                if "lengths" in given:
                    given["lengths"].fill_(1)
            found.append(torch.autograd.grad(output, list(layer.parameters()), upstream))
        same(*found[-2:])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("cell", "options"), KERNELS + LOOPS[2:], ids=name_of)
def test_checkpointing_changes_no_gradient(cell: str, options: dict[str, Any], reentrant: bool) -> None:
    layer, (x, *_) = build(cell, options), inputs_of(cell, options)
    x.requires_grad_()
    given = {"lengths": torch.tensor([5, 2, 4]), "reset": torch.rand(T, B) < 0.3}

    def run(x: Tensor) -> Tensor:
        return layer(x, **given)[0]  # type: ignore[no-any-return]

    outputs = [run(x), checkpoint(run, x, use_reentrant=reentrant)]
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        assert torch.equal(output, outputs[0])
    direct, again = (gradients(o, [x, *layer.parameters()], upstream) for o in outputs)
    for a, b in zip(direct, again, strict=True):
        assert torch.equal(a, b)


def gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """By .backward(), which reentrant checkpointing wants."""
    for leaf in leaves:
        leaf.grad = None
    output.backward(upstream)
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("cell", "options"), KERNELS + LOOPS, ids=name_of)
def test_all_that_is_kept_passes_through_saved_tensor_hooks(cell: str, options: dict[str, Any]) -> None:
    """Nothing hangs on a node beside them, so that hooks may offload all and a backward frees all."""
    layer, (x, *_) = build(cell, options), inputs_of(cell, options)
    moved: list[Tensor] = []

    def away(t: Tensor) -> int:
        moved.append(t.detach().clone())
        return len(moved) - 1

    found = []
    for hooks in (False, True):
        torch.manual_seed(0)
        if hooks:
            with torch.autograd.graph.saved_tensors_hooks(away, moved.__getitem__):
                output, _ = layer(x)
        else:
            output, _ = layer(x)
        assert not list(beside_saved([output]))
        found.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert sum(t.nbytes for t in moved) >= T * B * (INPUT + HIDDEN) * x.element_size()


def bytes_alive() -> int:
    gc.collect()
    # What other tests left behind may be a tensor without memory, which has no address either.
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and has_memory(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def has_memory(t: Tensor) -> bool:
    try:
        t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # fake, functional, or without a storage
        return False
    return True


@NEEDS_KERNELS
@pytest.mark.filterwarnings("ignore")  # of modules that gc.get_objects touches
@pytest.mark.parametrize("cell", LAYERS)
def test_memory_is_free_while_checkpointed_and_after_a_backward(cell: str) -> None:
    layer, x = LAYERS[cell](32, 64), torch.randn(100, 16, 32, requires_grad=True)
    output = 100 * 16 * 64 * 4
    before = bytes_alive()
    loss = checkpoint(lambda x: layer(x)[0].mean(), x, use_reentrant=False)
    assert bytes_alive() - before < output / 4
    loss.backward()
    before, total = bytes_alive(), torch.zeros(())
    for _ in range(3):
        loss = layer(x)[0].mean()
        loss.backward()
        total = total + loss  # its graph is not freed, but what that keeps is
    del loss
    assert bytes_alive() - before < output / 4


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.bfloat16(), "expected .* of torch.float32 on the CPU, but got .* of torch.bfloat16"),
        (lambda t: t[:-1], "expected .* on the CPU, but got"),
        (lambda t: t.to("meta"), "expected .* on the CPU, but got .* on meta"),
    ],
    ids=["dtype", "shape", "device"],
)
def test_hooks_that_give_other_tensors_back_are_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(T, B, INPUT)

    def back(t: Tensor) -> Tensor:
        products = t.shape == (T * B, 4 * HIDDEN)  # which the kernels keep
        return spoil(t) if products else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
        output, _ = layer(x)
    with pytest.raises(ValueError, match=message):
        output.sum().backward()


@NEEDS_KERNELS
def test_hooks_may_give_back_what_lies_otherwise_in_memory() -> None:
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    upstream, found = torch.randn(T, B, HIDDEN), []
    for turn in (lambda t: t, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t):
        with torch.autograd.graph.saved_tensors_hooks(turn, lambda t: t):
            output, _ = layer(x)
        found.append(torch.autograd.grad(output, list(layer.parameters()), upstream))
    same(*found)


@pytest.mark.parametrize(("cell", "options"), KERNELS, ids=name_of)
def test_a_second_backward_needs_the_graph_kept(cell: str, options: dict[str, Any]) -> None:
    layer, (x, *_) = build(cell, options), inputs_of(cell, options)
    output, _ = layer(x)
    leaves, upstream = list(layer.parameters()), torch.randn_like(output)
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    for a, b in zip(torch.autograd.grad(output, leaves, upstream), first, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(output, leaves, upstream)


def exact(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()


GIVEN = {
    "lengths": torch.tensor([5, 2, 4]),
    "reset": torch.tensor([[False] * B, [True, False, True], *[[False] * B] * 3]),
}


def batch_of_gradients(layer: nn.Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    output, _ = layer(leaf, **GIVEN)
    return torch.autograd.grad(
        output, [leaf, *layer.parameters()], drawn(2, *output.shape).to(x), is_grads_batched=True
    )


def vmap_of_gradients(layer: nn.Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    output, _ = layer(leaf, **GIVEN)
    return torch.func.vmap(lambda u: torch.autograd.grad(output, leaf, u, retain_graph=True))(
        drawn(2, *output.shape).to(x)
    )


def jacobian(layer: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda x: layer(x, **GIVEN)[0].sum(1), x, vectorize=True)


def forward_mode(layer: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, drawn(*x.shape).to(x)), **GIVEN)[0]).tangent


def forward_mode_over_backward(layer: nn.Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    output, _ = layer(leaf, **GIVEN)
    upstream = [drawn(*output.shape, seed=seed).to(x) for seed in (1, 2)]
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(output, leaf, forward_ad.make_dual(*upstream))
        return forward_ad.unpack_dual(found).tangent


def func_jvp(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(lambda x: layer(x, **GIVEN)[0], (x,), (drawn(*x.shape).to(x),))


def func_vmap_of_grad(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(lambda x: layer(x)[0].sin().sum()))(torch.stack([x, 2 * x]))


def func_hessian(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.hessian(lambda x: layer(x[:3, :1])[0].sin().sum())(x)


# Their forward is the kernels', whom another backward follows.
BACKWARD = (batch_of_gradients, vmap_of_gradients, forward_mode_over_backward)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "ask",
    [
        batch_of_gradients,
        vmap_of_gradients,
        jacobian,
        forward_mode,
        forward_mode_over_backward,
        func_jvp,
        func_vmap_of_grad,
        func_hessian,
    ],
)
@pytest.mark.parametrize(("cell", "options"), [("lstm", {}), ("gru", {}), ("rnn", {"norm": None})], ids=name_of)
def test_derivatives_of_other_kinds(
    cell: str, options: dict[str, Any], ask: Callable[[nn.Module, Tensor], Any]
) -> None:
    """Those that the kernels do not have come by a loop."""
    layer = LAYERS[cell](2, 8, **options)
    x = drawn(T, B, 2).float()
    with normwise.backend("cpu" if library.missing() is None and ask in BACKWARD else None):
        got = ask(layer, x)
    with normwise.backend("reference"):
        expected = ask(exact(layer), x.double())
    got, expected = (list(r) if isinstance(r, tuple) else [r] for r in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, kind="composed", count=T * B * 8, scale=max(1.0, b.abs().max().item()))


def test_running_statistics_are_not_moved_by_several_samples_of_a_vmap() -> None:
    layer, x = normwise.GRU(INPUT, HIDDEN, norm="batch"), torch.randn(2, T, B, INPUT)
    with pytest.raises(RuntimeError, match=r"running_mean or running_var, .* were not batched: use eval mode"):
        torch.func.vmap(lambda x: layer(x)[0])(x)
    layer.eval()
    same([torch.func.vmap(lambda x: layer(x)[0])(x)], [torch.stack([layer(s)[0] for s in x])])


@pytest.mark.parametrize("cell", LAYERS)
def test_a_tensor_that_is_given_twice_gets_both_gradients_once(cell: str) -> None:
    """In second derivatives too."""
    layer = LAYERS[cell](HIDDEN, HIDDEN, dtype=torch.float32)
    x, upstream, found = torch.randn(T, B, HIDDEN), torch.randn(T, B, HIDDEN), []
    weight = layer.weight_ih_l0
    for net, dtype in ((layer, torch.float32), (exact(layer), torch.float64)):
        shared = weight.detach().to(dtype).requires_grad_()
        with normwise.backend("reference" if dtype == torch.float64 else None):
            output, _ = torch.func.functional_call(
                net, {"weight_ih_l0": shared, "weight_hh_l0": shared}, (x.to(dtype),), tie_weights=False
            )
        (first,) = torch.autograd.grad(output, shared, upstream.to(dtype), create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), shared)
        found.append([first, second])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, kind="composed", count=T * B * HIDDEN, scale=max(1.0, b.abs().max().item()))


class Nothing(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


def test_no_gradient_from_above() -> None:
    layer, x = normwise.GRU(INPUT, HIDDEN), torch.randn(T, B, INPUT, requires_grad=True)
    for create_graph in (False, True):
        found = torch.autograd.grad(Nothing.apply(layer(x)[0]).sum(), [x], create_graph=create_graph, allow_unused=True)
        assert all(g is None or not g.any() for g in found)


@NEEDS_KERNELS
@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_a_compiled_model_may_change_an_output(cell: str) -> None:
    torch._dynamo.reset()
    layer, x = LAYERS[cell](HIDDEN, HIDDEN), torch.randn(T, B, HIDDEN)
    upstream = torch.randn_like(x)

    def run(x: Tensor) -> Tensor:
        output, _ = layer(x)
        output += x
        return F.relu_(output)

    outputs = [torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)]
    same(*[[o, *torch.autograd.grad(o, list(layer.parameters()), upstream)] for o in outputs])

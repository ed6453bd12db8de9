"""Rules about what flows through the model: units, gradients, summed inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from normwise.diagnosis.records import Diagnosis, Layer, NonFinite, Recurrence, Size
from normwise.diagnosis.rules import cures
from normwise.diagnosis.rules.rule import Match, some
from normwise.words import counted

# Share of a sigmoid's or tanh's inputs, or of a gate's values, in the flat part; share of ReLUs that never open.
SATURATED, GATES, DEAD = 0.3, 0.5, 0.5
# Norm of a gradient against that at the other end of the net, and of the sequence: what it may shrink by, an optimizer
# making up for some of it, and what it may grow by.
BY_DEPTH, BY_TIME, GROWN = 1e4, 1e6, 1e3
# Layers with weights, or layers of a recurrent module, that make a stack; and a change of size along it, short of
# what counts as vanishing or exploding, that a norm would have prevented.
DEEP, RECURRENT_LAYERS, DRIFT = 8, 3, 30.0
# Of the last quarter of the steps against the first.
GROWTH = 3.0


def flat(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer in diagnosis.layers:
        units = layer.units
        if units is not None and units.nonlinearity != "relu" and units.saturated > SATURATED:
            what = f"{units.saturated:.0%} of the inputs of its {units.nonlinearity} lie beyond {units.threshold:g}"
            cure = cures.text("saturated", cures.norm_before(layer))
            yield Match(layer.name, {"what": what, "share": units.saturated, "cure": cure})
        elif units is not None and units.nonlinearity == "relu" and units.dead > DEAD:
            what = f"{units.dead:.0%} of its {units.units} ReLUs are off on every sample"
            cure = cures.text("dead", cures.norm_before(layer))
            yield Match(layer.name, {"what": what, "share": units.dead, "cure": cure})
        for inside in layer.recurrence:
            worst = max(inside.gates, key=lambda gate: gate.saturated)
            limit = SATURATED if worst.threshold == 3 else GATES
            if worst.threshold and worst.saturated > limit:
                what = f"{worst.saturated:.0%} of gate {worst.name!r} of {inside.place} lie beyond {worst.threshold:g}"
                cure = cures.text("gates")
                yield Match(layer.name, {"what": what, "share": worst.saturated, "gate": worst.name, "cure": cure})


def gradient_by_depth(diagnosis: Diagnosis) -> Iterator[Match]:
    stack = _with_gradients(diagnosis)
    if len(stack) < 3:
        return
    # Without the last: its output is what the loss sees, and a head that starts small scales all before it alike.
    first, last = stack[0], stack[-2]
    if _output(first) > _output(last):
        # A branch that starts small (LayerScale) has a small gradient wherever it stands.
        last = max(stack[-1 - max(1, len(stack) // 4) : -1], key=_output)
    evidence = _ratio(_output(first), _output(last), BY_DEPTH)
    if evidence is not None:
        cure = cures.text("depth", cures.norms_behind(diagnosis, stack))
        evidence |= {"over": f"from {last.name!r} back to {first.name!r}", **_norms(diagnosis), "cure": cure}
        yield Match(first.name, evidence)


def gradient_by_time(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, inside in _insides(diagnosis):
        gradients = [g for g in inside.gradient if g > 0]
        if len(gradients) < 3:
            continue
        evidence = _ratio(gradients[0], max(gradients) if gradients[0] < gradients[-1] else gradients[-1], BY_TIME)
        if evidence is not None:
            norm = f"{inside.norm} norm inside" if inside.norm else "no norm inside"
            over = f"over {counted(len(inside.gradient), 'step')} of {inside.place}, back to the first"
            yield Match(layer.name, evidence | {"over": over, "norms": norm, "cure": cures.text("time")})


def vanishing_or_exploding(diagnosis: Diagnosis) -> Iterator[Match]:
    yield from gradient_by_depth(diagnosis)
    yield from gradient_by_time(diagnosis)


def no_norm(diagnosis: Diagnosis) -> Iterator[Match]:
    if any(layer.role == "norm" or layer.may_be_norm for layer in diagnosis.layers):
        return
    if any(inside.norm for _, inside in _insides(diagnosis)):
        return
    stack = _with_gradients(diagnosis)
    sizes = [layer.output.all.std for layer in stack if layer.output is not None and layer.output.all.std > 0]
    if len(stack) >= DEEP and len(sizes) > 2:
        # The head is left out, as in `gradient_by_depth`.
        drift = max(_factor(sizes[0], sizes[-2]), _factor(_output(stack[0]), _output(stack[-2])))
        if drift > DRIFT:
            what = f"signals or gradients change {drift:.3g}-fold over {len(stack)} layers with weights"
            cure = cures.text("stack", cures.norms_behind(diagnosis, stack))
            yield Match("", {"what": what, "layers": len(stack), "drift": drift, "cure": cure})
    for layer in diagnosis.layers:
        drifts = [
            max(_factor(r.gradient[0], r.gradient[-1]), _growth(r.summed)) for r in layer.recurrence if r.gradient
        ]
        if len(layer.recurrence) >= RECURRENT_LAYERS and drifts and max(drifts) > DRIFT:
            what = f"summed inputs or gradients change {max(drifts):.3g}-fold over the steps of a recurrent stack"
            evidence = {"what": what, "layers": len(layer.recurrence), "drift": max(drifts)}
            yield Match(layer.name, evidence | {"cure": cures.text("recurrent stack")})


def growing_sums(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, inside in _insides(diagnosis):
        growth = _growth(inside.summed)
        if inside.norm is None and growth > GROWTH:
            evidence = {"place": inside.place, "first": inside.summed[1], "last": inside.summed[-1], "growth": growth}
            yield Match(layer.name, evidence)


def not_finite(diagnosis: Diagnosis) -> Iterator[Match]:
    n = diagnosis.nonfinite
    known = any(
        layer.norm is not None and layer.norm.running and layer.norm.running.nonfinite for layer in diagnosis.layers
    )
    steps = 0 if diagnosis.training is None else sum(not math.isfinite(x) for x in diagnosis.training.losses)
    candidates = [
        (n.outputs, f"{counted(n.outputs, 'value')} of the model's output"),
        (n.losses, f"the loss of {n.losses} of {counted(diagnosis.data.batches, 'batch')}"),
        (len(n.gradients), f"the gradients of {counted(len(n.gradients), 'parameter')}"),
        # Running statistics that are spoilt are NW003's.
        (0 if known else n.eval_outputs, f"{counted(n.eval_outputs, 'value')} of the output in eval mode"),
        (0 if n.losses else steps, f"the loss at {steps} of the watched steps, which was finite before"),
    ]
    what = [words for count, words in candidates if count]
    if not what:
        return
    whole = " and ".join([", ".join(what[:-1]), what[-1]] if len(what) > 1 else what)
    evidence = {"outputs": n.outputs, "losses": n.losses, "gradients": some(n.gradients)}
    if n.parameters or n.inputs:
        # Nothing has to be looked for: this comes first, and what follows from it after.
        layer = next(iter(n.parameters), "").rpartition(".")[0]
        given = " and ".join(_parameters(n) + _batches(n))
        given = f"{given[0].upper()}{given[1:]}"
        evidence |= {"what": given, "where": f"From there {whole} are", "given": True, "cure": _cure(n, layer)}
    else:
        layer, where = _first_not_finite(diagnosis)
        evidence |= {"what": f"{whole[0].upper()}{whole[1:]} are NaN or infinite", "where": where, "given": False}
        evidence["cure"] = WHERE_IT_ARISES
    yield Match(layer, evidence)


WHERE_IT_ARISES = (
    "torch.autograd.set_detect_anomaly(True) names the operation on the way back; keep log, sqrt and division away "
    "from 0, x.clamp(min=1e-6), and exp and half precision from overflow; masked scores take a large negative number, "
    "torch.finfo(x.dtype).min, instead of -inf"
)


def _parameters(n: NonFinite) -> list[str]:
    if not n.parameters:
        return []
    each = [f"{name} ({count} of {of})" for name, (count, of) in n.parameters.items()]
    return [f"the model was given with NaN or infinity in its parameters: {some(each)}"]


def _batches(n: NonFinite) -> list[str]:
    if not n.inputs:
        return []
    which = f"batch {n.batches[0]}" if len(n.batches) == 1 else f"batches {some([str(index) for index in n.batches])}"
    return [f"the data hold NaN or infinity: {counted(n.inputs, 'value')} of the inputs of {which}"]


def _cure(n: NonFinite, layer: str) -> str:
    cures = []
    if n.parameters:
        module = f"model.get_submodule({layer!r})" if layer else "model"
        cures.append(
            "load a checkpoint from before it, or let the layers that have it start anew, as "
            f"{module}.reset_parameters() where the class has that; if training brought it about, a smaller learning "
            "rate, or the gradient clipped (torch.nn.utils.clip_grad_norm_)"
        )
    if n.inputs:
        cures.append(
            "mend the data where they are read: leave such samples out, x[x.isfinite().flatten(1).all(1)], or fill the "
            "gaps, x.nan_to_num(), which puts 0 for NaN"
        )
    return "; ".join(cures)


def _first_not_finite(diagnosis: Diagnosis) -> tuple[str, str]:
    """The first layer that has it, on the way forward or else on the way back, and that in words."""
    n = diagnosis.nonfinite
    called = [layer for layer in diagnosis.layers if layer.order is not None]
    if (first := n.first) is not None:
        sizes = _sizes(first.before, "the largest |x| of the outputs before")
        if not first.comes_in:
            return first.layer, f"The first layer that has it is {first.layer!r}: it gets finite numbers{sizes}"
        before = f"since {first.before[-1].layer!r}, called before it" if first.before else "before it is called"
        where = f"The first layer that has it is {first.layer!r}, where it comes in: it arises {before}{sizes}"
        return first.layer, where
    if (first := n.first_gradient) is not None:
        behind = repr(first.before[-1].layer) if first.before else "the loss"
        sizes = _sizes(first.before, "the norms of the gradients that arrived before")
        where = f"On the way back the first layer that has it is {first.layer!r}: it arises between it and {behind}"
        return first.layer, where + sizes
    for layer in reversed(called if n.gradients and not n.outputs and not n.losses else []):
        g = layer.gradient
        if g is not None and not all(math.isfinite(size) for size in g.weights.values()):
            return layer.name, f"On the way back the first layer that has it is {layer.name!r}, at its weights"
    return "", "No layer has it: it arises behind them, in the model's own code or in the loss"


def _sizes(before: Sequence[Size], what: str) -> str:
    """How large things were in the layers before, as the end of a sentence."""
    sizes = ", ".join(f"{s.layer or 'the model'} {s.size:.3g}" for s in before)
    return f" ({what}: {sizes})" if before else ""


def _with_gradients(diagnosis: Diagnosis) -> list[Layer]:
    """Layers with weights in the order of their calls, where a gradient arrives."""
    roles = ("linear", "conv", "recurrent", "attention")
    return [layer for layer in diagnosis.layers if layer.role in roles and _output(layer) > 0]


def _output(layer: Layer) -> float:
    return (layer.gradient.output if layer.gradient is not None else None) or 0.0


def _insides(diagnosis: Diagnosis) -> Iterator[tuple[Layer, Recurrence]]:
    for layer in diagnosis.layers:
        for inside in layer.recurrence:
            yield layer, inside


def _ratio(early: float, late: float, limit: float) -> dict[str, object] | None:
    """Evidence where the gradient `early` in the net or sequence is far below or above that `late`."""
    if not math.isfinite(early) or not math.isfinite(late):
        return None  # NW017 says so
    if early and late and not 1 / limit < early / late < GROWN:
        how = "vanishes" if early < late else "explodes"
        return {"how": how, "first": early, "last": late, "ratio": early / late}
    return None


def _norms(diagnosis: Diagnosis) -> dict[str, str]:
    names = [layer.name for layer in diagnosis.layers if layer.role == "norm" and layer.calls]
    unknown = [layer.name for layer in diagnosis.layers if layer.may_be_norm]
    if names:
        return {"norms": f"norms stand at {some(names)}"}
    if unknown:
        return {"norms": f"unknown layers that may be norms stand at {some(unknown)}"}
    return {"norms": "no norm stands in between"}


def _factor(a: float, b: float) -> float:
    """By what factor two sizes differ, whichever is larger."""
    return max(a / b, b / a) if a > 0 and b > 0 else 1.0


def _growth(summed: Sequence[float]) -> float:
    """The last quarter of the steps against the first; the very first step, which has no state yet, is left out."""
    after = list(summed[1:])
    quarter = len(after) // 4
    if quarter < 1:
        return 1.0
    first, last = sum(after[:quarter]), sum(after[-quarter:])
    return last / first if first else 1.0

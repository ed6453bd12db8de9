"""`normwise.recommend`: which norm to use, and why, before or after anything was measured."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import layers_of, unwrapped
from normwise.diagnosis.records import Diagnosis, Finding
from normwise.diagnosis.rules.circumstances import Circumstances, Kind
from normwise.diagnosis.rules.claims import cited
from normwise.diagnosis.rules.signals import DEEP
from normwise.diagnosis.rules.table import BY_CODE, RULES
from normwise.ops.conversion import lengths_tensor


@dataclass(frozen=True)
class Choice:
    """A norm that suits a kind of net. `family` is what rules speak against; "sync" pools the batches of all ranks."""

    name: str
    family: str
    code: str
    why: str
    claims: tuple[str, ...]


_GROUP = Choice(
    "GroupNorm",
    "group",
    "normwise.GroupNorm(groups, channels), or model, _ = normwise.convert(model, to='group')",
    "its statistics are those of one sample: they are the same at any batch size, in training and in evaluation",
    ("small-batch", "train-eval-gap"),
)
_LAYER = Choice(
    "LayerNorm",
    "layer",
    "normwise.LayerNorm(features), or normwise.RMSNorm(features) to save the mean",
    "its statistics are those of one position of one sample: neither the batch nor padding enters them",
    ("transformer", "padding", "no-affine"),
)
_SYNC = Choice(
    "SyncBatchNorm",
    "sync",
    "model, _ = normwise.convert(model, to='sync')",
    "its statistics are over the samples of all ranks",
    ("small-batch",),
)

# The norms for each kind of net, the best first. Which of them stands is up to the rules.
CHOICES: dict[Kind, tuple[Choice, ...]] = {
    "conv": (
        Choice(
            "BatchNorm",
            "batch",
            "normwise.BatchNorm2d(channels) behind each convolution, which then needs no bias",
            "in conv nets at a good batch size it does best, and it costs nothing in evaluation",
            ("cnn", "faster"),
        ),
        _SYNC,
        _GROUP,
    ),
    "mlp": (
        Choice(
            "BatchNorm",
            "batch",
            "normwise.BatchNorm1d(features) between each linear map and its nonlinearity",
            "a deep net of saturating units trains in fewer steps with it",
            ("faster", "saturation"),
        ),
        _SYNC,
        dataclasses.replace(
            _LAYER,
            why="its statistics are those of one sample: it learns online, at a batch size of one, too",
            claims=("batch-of-one", "saturation"),
        ),
    ),
    "recurrent": (
        Choice(
            "LayerNorm inside the recurrence",
            "layer",
            "normwise.LSTM(inputs, hidden, norm='layer') (or GRU, RNN), or model, _ = normwise.convert(model, "
            "recurrent='layer')",
            "it holds the summed inputs at one size at every step, in training and beyond its lengths",
            ("steady-sums", "rnn", "longer"),
        ),
    ),
    "transformer": (_LAYER,),
}


@dataclass(frozen=True)
class Recommendation:
    """Which norm to use.

    Attributes:
        norm: its name.
        code: how to get it.
        reasons: sentences, each with the claims or findings that it stands on.
        task: what was assumed.
    """

    norm: str
    code: str
    reasons: list[str]
    task: Circumstances
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.norm}: {self.code}", *(f"- {reason}" for reason in self.reasons)])


def recommend(
    what: nn.Module | str | Mapping[str, Any],
    *,
    batch_size: int | None = None,
    lengths: Any = None,
    diagnosis: Diagnosis | None = None,
) -> Recommendation:
    """Which norm to use, and why: in sentences that cite published claims and findings.

        print(normwise.recommend("conv net", batch_size=4))
        print(normwise.recommend(model, batch_size=64, diagnosis=normwise.diagnose(model, batches, loss=loss)))

    The rules that raise findings (`normwise.diagnose`) also say here which norm would raise one. Beside a claim stands
    what our own runs say of it, which may be that they contradict it; `normwise claims` tests it on this machine.

    Args:
        what: a model; or words, of which "conv", "image", "mlp", "linear", "rnn", "lstm", "gru", "transformer",
            "attention" and the like say what net it is, and "padded", "longer", "deep", "online" count; or a
            mapping with `kind` ("conv", "mlp", "recurrent", "transformer") and other fields of `Circumstances`
            (ranks, padded, layers, longer).
        batch_size: samples a step on one rank.
        lengths: of sequences, as the layers take it: integers (tensor, list or array). Where they differ there is
            padding.
        diagnosis: of the model, whose findings then count too.

    Raises:
        DiagnosisError: words from which no kind of net can be told, unknown fields, or a batch size below 1.
        TypeError: lengths that are no integers.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise DiagnosisError(f"batch_size must be a positive integer, but got {batch_size!r}")
    task = _circumstances(what)
    if batch_size is not None:
        task = dataclasses.replace(task, batch_size=batch_size)
    if lengths is not None:
        found = lengths_tensor(lengths)
        task = dataclasses.replace(task, padded=task.padded or len(set(found.flatten().tolist())) > 1)
    measured: Sequence[Finding] = ()
    if diagnosis is not None:
        measured = [*diagnosis.findings, *diagnosis.silenced]
        task = dataclasses.replace(task, ranks=max(task.ranks, diagnosis.ranks))
        if task.batch_size is None and diagnosis.data.sizes:
            task = dataclasses.replace(task, batch_size=min(diagnosis.data.sizes) or None)
        task = dataclasses.replace(task, padded=task.padded or bool(diagnosis.data.padding))
    candidates = [c for c in CHOICES[task.kind] if c.family != "sync" or task.ranks > 1]
    against = {candidate.name: _against(candidate, task, measured) for candidate in candidates}
    chosen = next((c for c in candidates if not against[c.name]), candidates[-1])
    reasons = [f"{chosen.name}: {chosen.why}{cited(chosen.claims)}."]
    for candidate in candidates[: candidates.index(chosen)]:
        reasons += [f"Not {candidate.name}: {reason}." for reason in against[candidate.name]]
    if not any(c.family == "batch" for c in candidates):
        reasons += [f"Not BatchNorm: {reason}." for reason in _objections("batch", task, measured)]
    reasons += [f"Not without a norm: {reason}." for reason in _objections("none", task, measured)]
    if task.batch_size is None and any(c.family == "batch" for c in candidates):
        reasons.append("The batch size is not known: with fewer than 16 samples ask again with batch_size=.")
    codes = [f.code for f in measured if BY_CODE[f.code].speaks_against is not None]
    return Recommendation(chosen.name, chosen.code, reasons, task, list(dict.fromkeys(codes)))


def _against(candidate: Choice, task: Circumstances, measured: Sequence[Finding]) -> list[str]:
    if candidate.family == "sync":
        pooled = dataclasses.replace(task, batch_size=None if task.batch_size is None else task.batch_size * task.ranks)
        return _objections("batch", dataclasses.replace(pooled, ranks=1), ())
    return _objections(candidate.family, task, measured)


def _objections(family: str, task: Circumstances, measured: Sequence[Finding]) -> list[str]:
    """What the rules have against a norm: as measured, else as it can be foreseen."""
    found = []
    for rule in RULES:
        if rule.speaks_against != family:
            continue
        seen = [finding for finding in measured if finding.code == rule.code]
        foreseen = rule.foreseen(task)
        if seen:
            where = f"at {seen[0].layer!r}" if seen[0].layer else "in the model"
            more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
            found.append(f"{rule.code} was found {where}{more}: {seen[0].cause.rstrip('.')}{cited(rule.claims)}")
        elif foreseen is not None:
            found.append(f"{foreseen} ({rule.code}){cited(rule.claims)}")
    return found


WORDS: dict[str, Kind] = {
    "transformer": "transformer",
    "attention": "transformer",
    "bert": "transformer",
    "gpt": "transformer",
    "vit": "transformer",
    "llm": "transformer",
    "llama": "transformer",
    "lstm": "recurrent",
    "gru": "recurrent",
    "rnn": "recurrent",
    "recurrent": "recurrent",
    "conv": "conv",
    "convolutional": "conv",
    "cnn": "conv",
    "resnet": "conv",
    "unet": "conv",
    "vgg": "conv",
    "mobilenet": "conv",
    "efficientnet": "conv",
    "image": "conv",
    "images": "conv",
    "mlp": "mlp",
    "linear": "mlp",
    "dense": "mlp",
    "tabular": "mlp",
}


_OPEN = "what kind of net is {net}, 'conv', 'mlp', 'recurrent' or 'transformer'? Give that word"
_GRAPHS = (
    "of a graph net say 'mlp' for the maps at each node, which are normalized like any rows, (nodes, features); each "
    "graph by its own statistics is normwise.InstanceNorm1d(features)(nodes, segments=graph): docs/howto/graphs.md"
)
_AGENTS = (
    f"{_OPEN.format(net='the policy')}, and 'online' where it sees one step at a time; observations and rewards in "
    "units of their own are for normwise.RunningNorm: docs/howto/reinforcement-learning.md"
)
_SERIES = (
    f"{_OPEN.format(net='the forecaster')}; levels and scales that differ between series are for "
    "normwise.RunningNorm(variables, per_instance=True): docs/howto/time-series.md"
)

# What people call a problem or a way of training, of which nobody can say what the net is: what to say instead.
OTHER_WORDS: dict[str, str] = {
    **dict.fromkeys(("graph", "graphs", "gnn", "gcn", "gat", "molecule", "molecules", "cloud", "clouds"), _GRAPHS),
    **dict.fromkeys(("rl", "reinforcement", "agent", "policy", "ppo", "dqn", "sac", "actor", "critic"), _AGENTS),
    **dict.fromkeys(("series", "timeseries", "forecast", "forecasting"), _SERIES),
    **dict.fromkeys(("gan", "generator", "discriminator"), _OPEN.format(net="the generator, or the discriminator")),
    **dict.fromkeys(("vae", "autoencoder", "diffusion", "speech", "audio"), _OPEN.format(net="it")),
}


# How alike a word and one of these are, from 0 to 1, if it may be a slip of the keys: "trasformer" is .95 of
# "transformer", and "agent" .6 of "image".
_TYPO = 0.75


def _circumstances(what: Any) -> Circumstances:
    if isinstance(what, str):
        return _from_words(what)
    if isinstance(what, Mapping):
        return _from_fields(what)
    return _from_model(what)


def _from_words(text: str) -> Circumstances:
    # "U-Net" is "unet", and "actor-critic" two words.
    spelt = (text.replace("-", " ").replace("_", " ").replace("/", " "), text.replace("-", ""))
    words = [word.strip(".,;:()").lower() for spelling in spelt for word in spelling.split()]
    # In the order of the table: a transformer on images is a transformer.
    kind = next((kind for word, kind in WORDS.items() if word in words), None)
    if kind is None:
        near = [m for word in words for m in difflib.get_close_matches(word, WORDS, n=1, cutoff=_TYPO)]
        other = next((OTHER_WORDS[word] for word in words if word in OTHER_WORDS), None)
        if other is not None:
            raise DiagnosisError(f"no kind of net can be told from {text!r}: {other}. Or give the model")
        hint = f" Did you mean {near[0]!r}?" if near else ""
        kinds = {kind: [word for word, its_kind in WORDS.items() if its_kind == kind] for kind in CHOICES}
        known = "; ".join(f"{kind}: {', '.join(map(repr, words))}" for kind, words in kinds.items())
        raise DiagnosisError(
            f"no kind of net can be told from {text!r}: use one of these words, whatever the task is ({known}), or "
            f"give the model.{hint}"
        )
    return Circumstances(
        kind,
        batch_size=1 if "online" in words else None,
        padded=bool({"padded", "padding", "varying", "lengths"} & set(words)),
        layers=DEEP if "deep" in words else None,
        longer="longer" in words,
    )


def _from_fields(given: Mapping[str, Any]) -> Circumstances:
    known = [f.name for f in dataclasses.fields(Circumstances)]
    unknown = [name for name in given if name not in known]
    if unknown or given.get("kind") not in CHOICES:
        wrong = f"unknown field {unknown[0]!r}" if unknown else f"kind={given.get('kind')!r}"
        raise DiagnosisError(
            f"{wrong}: a task has kind ({', '.join(map(repr, CHOICES))}) and perhaps {', '.join(known[1:])}"
        )
    return Circumstances(**given)


def _from_model(model: Any) -> Circumstances:
    inner, _ = unwrapped(model)
    roles = [named.role for named in layers_of(inner)]
    weighted = sum(role in ("conv", "linear", "recurrent", "attention") for role in roles)
    kind: Kind = "mlp"
    for role, its_kind in (("conv", "conv"), ("recurrent", "recurrent"), ("attention", "transformer")):
        if role in roles:
            kind = its_kind  # type: ignore[assignment]
    names = {type(m).__name__.lower() for m in inner.modules()}
    if kind == "mlp" and any("attention" in name or "transformer" in name for name in names):
        kind = "transformer"
    return Circumstances(kind, layers=weighted)

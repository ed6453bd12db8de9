"""Which norm is recommended, and what for: the same rules as those of the findings."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis import DiagnosisError, diagnose
from normwise.diagnosis.choices import CHOICES, OTHER_WORDS, WORDS
from normwise.diagnosis.rules.circumstances import Circumstances
from normwise.diagnosis.rules.claims import SOURCES
from normwise.diagnosis.rules.table import RULES
from normwise.lab.claims import claims
from normwise.lab.cost import recorded

# Calls of this library in cures and codes.
NAMES = re.compile(r"normwise\.(\w+)")


@pytest.mark.parametrize(
    ("what", "batch_size", "norm", "codes"),
    [
        ("conv net", 64, "BatchNorm", set()),
        ("conv net", 4, "GroupNorm", {"NW001"}),
        ({"kind": "conv", "ranks": 8}, 4, "SyncBatchNorm", {"NW001", "NW007"}),
        ({"kind": "conv", "ranks": 2}, 4, "GroupNorm", {"NW001", "NW007"}),
        ({"kind": "conv", "ranks": 8}, 64, "BatchNorm", set()),
        ("a deep MLP", 64, "BatchNorm", {"NW014"}),
        ("online MLP", None, "LayerNorm", {"NW001"}),
        ("LSTM, sequences longer than in training", 32, "LayerNorm inside the recurrence", {"NW014", "NW015", "NW016"}),
        ("transformer on padded text", 64, "LayerNorm", {"NW004"}),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 2, "GroupNorm", {"NW001"}),
        (nn.GRU(4, 5), 32, "LayerNorm inside the recurrence", {"NW014", "NW015", "NW016"}),
        (nn.TransformerEncoderLayer(8, 2), 32, "LayerNorm", set()),
        (nn.Linear(4, 5), 32, "BatchNorm", set()),
    ],
)
def test_what_is_recommended(what, batch_size, norm, codes):
    found = normwise.recommend(what, batch_size=batch_size)
    assert found.norm == norm
    text = str(found)
    assert set(re.findall(r"NW\d{3}", text)) == codes
    assert found.reasons[0].startswith(norm)
    assert "[claim " in found.reasons[0]
    assert found.code in text


def test_findings_count():
    """What was measured speaks in place of what could be foreseen."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    diagnosis = diagnose(model, batches, loss=nn.functional.cross_entropy)
    found = normwise.recommend(model, diagnosis=diagnosis)
    assert (found.norm, found.findings, found.task.batch_size) == ("LayerNorm", ["NW001"], 8)
    assert "NW001 was found at '1'" in str(found)


@pytest.mark.parametrize("lengths", [[3, 5, 4], torch.tensor([3, 5])])
def test_lengths_that_differ_are_padding(lengths):
    found = normwise.recommend("transformer", batch_size=32, lengths=lengths)
    assert found.task.padded
    assert "NW004" in str(found)


def test_lengths_that_are_one_are_none():
    assert not normwise.recommend("transformer", batch_size=32, lengths=[7, 7, 7]).task.padded
    assert not normwise.recommend("transformer", batch_size=32, lengths=[]).task.padded
    with pytest.raises(TypeError, match="lengths must be"):
        normwise.recommend("transformer", lengths=[0.5, 1.0])


def test_an_unknown_batch_size_is_said():
    assert "batch size is not known" in str(normwise.recommend("conv net"))
    assert "batch size is not known" not in str(normwise.recommend("conv net", batch_size=32))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "a nice net",
            "no kind of net can be told from 'a nice net': use one of these words.*mlp: 'mlp', 'linear', 'dense'",
        ),
        ("GNN", "no kind of net can be told from 'GNN': of a graph net say 'mlp'.*segments=graph"),
        ("a GAN's generator", "what kind of net is the generator, or the discriminator, 'conv', 'mlp'"),
        ("actor-critic (RL)", "what kind of net is the policy, .*'online'.*normwise.RunningNorm"),
        ("PPO", "what kind of net is the policy"),
        ("time series", "per_instance=True"),
        ("a transfomer", "Did you mean 'transformer'"),
        ({"kind": "convolution"}, "kind='convolution': a task has kind .'conv'"),
        ({"kind": "conv", "size": 3}, "unknown field 'size'"),
        (3, "model must be a torch.nn.Module, but got int"),
    ],
)
def test_what_says_too_little(what, message):
    with pytest.raises(DiagnosisError, match=message):
        normwise.recommend(what)


def test_what_a_message_says_to_say_is_understood():
    for other in OTHER_WORDS.values():
        for word in re.findall(r"'(\w+)'", other):
            assert normwise.recommend(f"{word} of an mlp" if word == "online" else word).norm
    for word, kind in WORDS.items():
        assert normwise.recommend(word).task.kind == kind
        assert word not in OTHER_WORDS
    assert normwise.recommend("a U-Net").task.kind == normwise.recommend("res-net").task.kind == "conv"
    assert normwise.recommend("graph net of mlp").task.kind == "mlp"


def test_a_batch_size_below_one_is_refused():
    for size in (0, -1, 2.5, True):
        with pytest.raises(DiagnosisError, match="batch_size must be a positive integer"):
            normwise.recommend("conv net", batch_size=size)


def test_the_claims_are_the_labs():
    """This room may not import the lab: so ids, sources and verdicts stand here twice, and must be the same."""
    cited = {claim for rule in RULES for claim in rule.claims}
    cited |= {claim for choices in CHOICES.values() for choice in choices for claim in choice.claims}
    assert cited == set(SOURCES)
    record = recorded()
    assert {name: (claims()[name].source, record[name]["verdict"]) for name in SOURCES} == SOURCES


def test_it_says_where_our_runs_speak_against_a_claim_that_it_cites():
    told = str(normwise.recommend("rnn"))
    assert "claim faster: Ioffe & Szegedy 2015, sections 3.3 and 4.1 (contradicted in our runs)" in told


def test_what_is_foreseen_has_a_norm_that_it_speaks_against():
    worst = [
        Circumstances(kind, batch_size=2, ranks=2, padded=True, layers=30, longer=True)
        for kind in ("conv", "recurrent", "mlp", "transformer")
    ]
    for rule in RULES:
        if any(rule.foreseen(task) for task in worst):
            assert rule.speaks_against in ("batch", "none")


def test_cures_and_codes_name_calls_that_exist():
    texts = [rule.cure for rule in RULES] + [choice.code for choices in CHOICES.values() for choice in choices]
    named = {name for text in texts for name in NAMES.findall(text)}
    assert len(named) > 8
    assert [name for name in sorted(named) if not hasattr(normwise, name)] == []


@pytest.mark.parametrize("words", ["reinforcement learning agent", "an online policy", "stock prices", "graph"])
def test_words_that_are_like_no_kind_of_net_get_no_hint(words: str) -> None:
    with pytest.raises(DiagnosisError, match="no kind of net can be told from") as caught:
        normwise.recommend(words)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(("typed", "meant"), [("trasformer", "transformer"), ("cnns", "cnn"), ("imge", "image")])
def test_slips_of_the_keys_get_a_hint(typed: str, meant: str) -> None:
    with pytest.raises(DiagnosisError, match=rf"Did you mean '{meant}'"):
        normwise.recommend(typed)

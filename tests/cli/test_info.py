from __future__ import annotations

import json
import platform
from types import SimpleNamespace

import pytest
import torch

import normwise
from normwise.backends.cpu import library
from normwise.ops import dispatch
from support.backends import without_kernels


def test_json_tells_versions_devices_and_backends(normwise_command):
    status, out, err = normwise_command("info", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["normwise"] == normwise.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["devices"]) == 1 + torch.accelerator.device_count()
    assert facts["devices"][0]["threads"] == torch.get_num_threads()
    assert {entry["backend"]: entry["reason"] for entry in facts["backends"]} == dispatch.found()
    assert all(entry["found"] == (entry["reason"] is None) for entry in facts["backends"])


def test_text_says_for_every_backend_found_or_why_not(normwise_command):
    status, out, err = normwise_command("info")
    assert (status, err) == (0, "")
    assert torch.__version__ in out
    for name, obstacle in dispatch.found().items():
        assert f"  {name:<10} {'found' if obstacle is None else f'not found: {obstacle}'}\n" in out


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize(("isa", "how"), [("avx512_amx", "in AMX tiles"), ("baseline", "with operands rounded")])
def test_the_instruction_set_is_told_and_what_it_does_to_bfloat16(normwise_command, monkeypatch, isa, how):
    monkeypatch.setattr(library, "isa", lambda: isa)
    assert json.loads(normwise_command("info", "--json").out)["instruction_set"] == isa
    assert f"  The cpu kernels use {isa}; recurrent layers in bfloat16 multiply {how}" in normwise_command("info").out


def test_kernels_that_are_turned_off_are_not_there_and_why(normwise_command):
    with without_kernels():
        out = normwise_command("info").out
        assert f"  cpu        not found: {library.missing()}\n" in out
        assert "The cpu kernels use" not in out
        assert json.loads(normwise_command("info", "--json").out)["instruction_set"] is None


@pytest.mark.parametrize(
    ("system", "machine", "told"),
    [
        ("Linux", "x86_64", None),
        ("Linux", "aarch64", "On this platform only the kernels were tested, in an emulator"),
        ("Darwin", "arm64", "On this platform nothing of normwise was ever built or tested."),
        ("Windows", "AMD64", "On this platform nothing of normwise was ever built or tested."),
    ],
)
def test_a_platform_that_was_never_tried_is_labelled_so(normwise_command, monkeypatch, system, machine, told):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    out = normwise_command("info").out
    assert ("On this platform" not in out) if told is None else (told in out)
    assert "python -m normwise.selftest" in out
    untried = json.loads(normwise_command("info", "--json").out)["untried"]
    assert untried is None if told is None else untried in out


def test_a_forced_backend_is_named(normwise_command):
    assert "Forced: none" in normwise_command("info").out
    with normwise.backend("reference"):
        assert "Forced: reference" in normwise_command("info").out
        assert json.loads(normwise_command("info", "--json").out)["forced"] == "reference"


@pytest.mark.parametrize(
    ("kind", "line"), [("cuda", "  cuda:0     Great GPU, 80 GiB\n"), ("mps", "  mps:0      mps\n")], ids=["cuda", "mps"]
)
def test_an_accelerator_is_listed(normwise_command, monkeypatch, kind, line):
    """With torch's answers replaced, so that this runs where there is none."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    properties = SimpleNamespace(name="Great GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    status, out, err = normwise_command("info")
    assert (status, err) == (0, "")
    assert line in out
    assert json.loads(normwise_command("info", "--json").out)["devices"][1]["device"] == f"{kind}:0"

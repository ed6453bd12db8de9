"""TensorBoard and Weights & Biases, read back by their own readers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

import normwise
from normwise.integrations import TensorBoardLogger, WandbLogger

BLOCK, HEADER = 32768, struct.Struct("<IHB")


def records(file: Path) -> Iterator[Any]:
    """Of an offline run: LevelDB's log format, behind a header of seven bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(data, at)
        at += HEADER.size
        whole += data[at : at + size]
        at += size
        if kind in (1, 4):  # full, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, once the process that writes its file has written the end."""
    (file,) = folder.rglob("*.wandb")
    for _ in range(300):
        found = [(record.WhichOneof("record_type"), record) for record in records(file)]
        if "exit" in dict(found):
            break
        time.sleep(0.1)
    rows = [record.history for kind, record in found if kind == "history"]
    return [row_of(row) for row in rows]


def row_of(history: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        *outer, last = item.nested_key or [item.key]
        inside = row
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return row


def looked_at(logger: Any, steps: int = 3) -> list[normwise.integrations.Look]:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.99), nn.Tanh())
    looks = []
    with normwise.Monitor(model, logger, every=2) as monitor:
        for _ in range(steps):
            model.zero_grad()
            model(torch.randn(20, 6)).square().sum().backward()
            looks.append(monitor.step())
    return [look for look in looks if look is not None]


@pytest.mark.parametrize("given", ["folder", "writer"])
def test_tensorboard_reads_numbers_histograms_and_findings(tmp_path, given):
    logger = TensorBoardLogger(tmp_path if given == "folder" else SummaryWriter(str(tmp_path)))
    looks = looked_at(logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()  # before it is closed: each look is flushed
    for tag, value in looks[1].scalars.items():
        first, second = events.Scalars(tag)
        assert (first.step, second.step) == (0, 2)
        assert second.value == pytest.approx(value, rel=1e-6)
    assert [event.step for event in events.Histograms("normwise/1/bias")] == [0, 2]
    assert [event.step for event in events.Tensors("normwise/findings/NW006/text_summary")] == [0]
    logger.close()


def test_an_offline_run_of_wandb_has_them_too(tmp_path):
    with WandbLogger(project="normwise", mode="offline", dir=str(tmp_path)) as logger:
        looks = looked_at(logger)
    rows = history(tmp_path)
    assert [row["normwise/step"] for row in rows] == [0, 2]
    for row, look in zip(rows, looks, strict=True):
        assert {tag: row[tag] for tag in look.scalars} == pytest.approx(look.scalars, rel=1e-6)
        assert row["normwise/1/gain"]["_type"] == "histogram"
    assert rows[0]["normwise/findings"]["nrows"] == 1
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"][0][:4] == [0, "NW006", "warning", "1"]
    assert wandb.run is None


def test_a_run_that_is_open_stays_open(tmp_path):
    with wandb.init(mode="offline", dir=str(tmp_path)) as run:
        run.log({"loss": 1.0}, step=1000)  # later steps of its own do not get in the way
        with WandbLogger() as logger:
            looked_at(logger)
        with pytest.raises(TypeError, match=r"settings of wandb.init \(project\), but a run is open already"):
            WandbLogger(project="other")
        run.log({"loss": 0.5}, step=2000)
    rows = history(tmp_path)
    assert [row["normwise/step"] for row in rows if "normwise/step" in row] == [0, 2]
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]
    with pytest.raises(TypeError, match=r"run must be what wandb.init\(\) returned, but got str"):
        WandbLogger("normwise")

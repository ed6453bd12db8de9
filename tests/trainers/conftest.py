"""What the libraries of these tests need before they can be imported."""

import os

from support import offline_libraries  # noqa: F401

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_CONSOLE"] = "off"

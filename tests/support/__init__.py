"""What tests share: the table of tolerances, samples and cases, the choice of a backend, devices, child processes."""

from __future__ import annotations

import pkgutil

import pytest

# A failed assert of a helper shows its values, as those of the tests do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))

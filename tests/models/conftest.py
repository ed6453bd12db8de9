"""What the libraries of these tests need before they can be imported."""

from support import offline_libraries  # noqa: F401

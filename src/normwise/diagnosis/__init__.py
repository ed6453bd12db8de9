"""Looks at a user's model: collect, then findings, then a report. What is collected: see `records`."""

from normwise.diagnosis.choices import Recommendation, recommend
from normwise.diagnosis.errors import DiagnosisError, UserCodeError
from normwise.diagnosis.monitor import Monitor
from normwise.diagnosis.page import write_page
from normwise.diagnosis.records import Diagnosis, Finding
from normwise.diagnosis.run import diagnose
from normwise.diagnosis.table import as_text

__all__ = [
    "Diagnosis",
    "DiagnosisError",
    "Finding",
    "Monitor",
    "Recommendation",
    "UserCodeError",
    "as_text",
    "diagnose",
    "recommend",
    "write_page",
]

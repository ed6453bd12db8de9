"""Looks at a user's model: collect, then findings, then a report. What is collected: see `records`."""

from normwise.diagnosis.choices import Recommendation, recommend
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.monitor import Monitor
from normwise.diagnosis.records import Diagnosis, Finding
from normwise.diagnosis.run import diagnose

__all__ = ["Diagnosis", "DiagnosisError", "Finding", "Monitor", "Recommendation", "diagnose", "recommend"]

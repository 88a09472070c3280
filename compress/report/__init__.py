"""A published checkpoint described for people: an HTML page, a model card, plots."""

from __future__ import annotations

from compress.report.measurement import check_picture, write_picture
from compress.report.write import write_report

__all__ = ["check_picture", "write_picture", "write_report"]

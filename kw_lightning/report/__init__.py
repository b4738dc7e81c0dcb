"""What a run has reached and learnt, to look at: one page that works offline, and figures for a paper."""

from kw_lightning.report.writing import Report, report

__all__ = ["Report", "report"]

"""What a run has reached and learnt, to look at: one page without a network, and figures for a paper."""

from kw_lightning.report.writing import Report, report

__all__ = ["Report", "report"]

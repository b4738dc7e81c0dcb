"""What `kw doctor` looks at: this machine, and the files of a run."""

from __future__ import annotations

from kw_lightning.doctor.findings import Finding
from kw_lightning.doctor.machine import examine_machine
from kw_lightning.doctor.run import examine_run

__all__ = ["Finding", "examine_machine", "examine_run"]

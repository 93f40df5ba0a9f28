"""What a first reading may skip: official data, catalogues, retrieval, generated tasks, scripted players, a gymnasium
space, models, settings, runs.

Import it before torch. OpenMP's threads (libgomp's, on Linux) spin for long while they wait for each other: beside two
other programs on two cores a training step took 90 s. If they sleep after a short spin it takes 8, and 3.6 alone, as
before. OMP_WAIT_POLICY=PASSIVE would cost a tenth alone. What the user has set stays.
"""

import os
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

show, show_ignored = sys.excepthook, sys.unraisablehook


def show_defect(kind, error, trace):
    """Ctrl-C in the seconds that torch takes to load, or at the very end, is not a defect, and has no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        show(kind, error, trace)


def show_ignored_defect(what):
    if not issubclass(what.exc_type, KeyboardInterrupt):
        show_ignored(what)


if Path(__file__).parent.parent in Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents:
    sys.excepthook, sys.unraisablehook = show_defect, show_ignored_defect  # not in programs that import these

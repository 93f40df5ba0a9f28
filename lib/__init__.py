"""What a first reading may skip: official data, catalogues, retrieval, generated tasks, scripted players, a gymnasium
space, models, LoRA, memory, settings, runs. After sdar.py, engine.py (sampling) and parallel.py (torchrun) are next.

Import it before torch. Idle OpenMP threads busy-wait; on a shared machine that made a training step take 90 s instead
of 8. GOMP_SPINCOUNT shortens the spin. OMP_WAIT_POLICY=PASSIVE would slow an idle machine by 10 %. What the user has
set stays.
"""

import os
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

show_uncaught, show_unraisable = sys.excepthook, sys.unraisablehook


def uncaught_except_interrupt(kind, error, trace):
    """Ctrl-C in the seconds that torch takes to load, or at the very end, is not a defect, and has no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        show_uncaught(kind, error, trace)


def unraisable_except_interrupt(what):
    if not issubclass(what.exc_type, KeyboardInterrupt):
        show_unraisable(what)


if Path(__file__).parent.parent in Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents:
    sys.excepthook, sys.unraisablehook = uncaught_except_interrupt, unraisable_except_interrupt  # in our programs alone

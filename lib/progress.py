"""Progress bars on standard error. Bars nest; `advance` and `tell` act on the innermost.

Where standard error is not a terminal nothing is written.
"""

import contextlib
import time

from tqdm import tqdm

PAUSE = 0.2  # seconds between two redraws for the sake of a text
_open = []  # bars, innermost last


@contextlib.contextmanager
def bar(doing, total, unit):
    """A bar over the block, of `total` units."""
    _open.append(tqdm(total=total, desc=doing, unit=unit, leave=False, dynamic_ncols=True, disable=None))
    try:
        yield
    finally:
        _open.pop().close()


def advance(count):
    """So many units more are done."""
    if _open:
        _open[-1].update(count)


def tell(text):
    """What goes on within the innermost bar's current unit."""
    if _open and not _open[-1].disable:
        shown = _open[-1]
        shown.set_postfix_str(text, refresh=False)
        if time.time() - shown.last_print_t > PAUSE:
            shown.refresh()
            shown.last_print_t = time.time()

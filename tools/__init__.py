"""Programs beside the main ones, run as python -m tools.NAME."""

import lib  # noqa: F401  before torch, whose threads wait as it says

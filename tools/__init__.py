"""Programs beside the main ones: python -m tools.clone, tiny, bench_kernels, measure."""

import lib  # noqa: F401  before torch, whose threads wait as it says

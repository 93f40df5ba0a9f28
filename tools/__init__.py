"""Programs beside the main ones, run as python -m tools.NAME."""

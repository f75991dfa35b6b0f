"""What the package costs in seconds and bytes, each measured by one script; `report.py` makes docs/performance.md."""

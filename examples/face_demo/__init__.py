"""Helpers of the example scripts: face data, a small network, metrics, plots and a report."""

"""Metrics, the comparison table and the report."""

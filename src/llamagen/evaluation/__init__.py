"""Evaluation: metrics, protocols, reports and speed."""

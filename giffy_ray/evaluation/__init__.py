"""Metrics, evaluation of generated clips, and its reports."""

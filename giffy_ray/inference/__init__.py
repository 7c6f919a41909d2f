"""Trained models for inference: loading, registration in MLflow, and MLflow's pyfunc interface."""

"""MLflow: experiment tracking, the model registry, and a local server."""

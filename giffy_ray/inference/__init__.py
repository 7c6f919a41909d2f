"""Loading of trained models, and MLflow model flavour."""

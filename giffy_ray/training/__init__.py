"""Training loop, checkpoints, and the Ray Train driver."""

"""Training: the loop that every worker runs, checkpoints, and the driver around Ray Train."""

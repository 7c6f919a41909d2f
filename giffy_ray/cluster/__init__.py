"""Ray: what a cluster has, and a local head."""

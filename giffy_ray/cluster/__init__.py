"""Ray clusters: connecting, dividing their resources, and a local head."""

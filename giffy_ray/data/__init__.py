"""Data pipeline, from a folder of videos to batches of clips; `prepare` runs everything up to batching."""

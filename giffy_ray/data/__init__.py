"""From a folder of videos to batches of clips; `prepare` is the whole way but the last step."""

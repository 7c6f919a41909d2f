"""Building blocks without Ray Train, models or configuration."""

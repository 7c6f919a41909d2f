"""Prepares a dataset: python jobs/prepare.py [EXPERIMENT.yaml] [data.root=... ...] [--prune [--dry-run]]

Decodes the videos, and prints and draws what the dataset contains. Every job decodes a dataset on first use; run this
one before you pay for GPUs. It also verifies the checksums of cached clips, and retries videos that were rejected for a
possibly transient reason.

With --prune it decodes nothing, and removes from `storage` what this experiment's videos do not need: clips of other
decode settings, datasets and shards of other videos, built-in videos of other settings, and leftovers of killed jobs.
It keeps everything that a running training uses. --prune --dry-run only lists what would be removed.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.prepare_dataset, __doc__, _DEFAULT, flags=workflows.PREPARE_FLAGS)

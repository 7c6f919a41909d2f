"""Renders the built-in dataset: python jobs/make_dataset.py [EXPERIMENT.yaml] [data.synthetic.training_clips=400 ...]

Writes H.264 videos in the layout of Moments in Time below the experiment's storage. Every job does so on first use; run
this one to look at the videos or to use them elsewhere.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.render_dataset, __doc__, _DEFAULT)

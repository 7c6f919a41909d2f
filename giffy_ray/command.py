"""The command line of all jobs: NAME.py [EXPERIMENT.yaml] [section.field=value ...] [--profile] [--resume HOW]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from giffy_ray import cluster
from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.messages import redact_output
from giffy_ray.storage import settle


def run(job: Callable[[Experiment], None], usage: str | None, default: Path) -> None:
    """Reads the experiment, joins the cluster and does the job. Exit code 0 only when the work was done.

    Without an experiment file `default` is read. A mistake in the experiment ends with code 2 and one clear message.
    """
    redact_output()
    words = _plain(sys.argv[1:])
    if {"-h", "--help"} & set(words):
        print(usage)
        return
    path = words.pop(0) if words and "=" not in words[0] else default
    try:
        experiment = load(path, words)
        experiment = override(experiment, {"storage": settle(experiment.storage)})
        cluster.connect()
        job(experiment)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _plain(words: list[str]) -> list[str]:
    """With the fields that options stand for: --profile, and --resume auto, never or must."""
    plain: list[str] = []
    for word in words:
        if word == "--profile":
            plain.append("speed.profile=true")
        elif word.startswith("--resume="):
            plain.append(f"search.resume={word.removeprefix('--resume=')}")
        elif plain and plain[-1] == "--resume":
            plain[-1] = f"search.resume={word}"
        else:
            plain.append(word)
    return plain

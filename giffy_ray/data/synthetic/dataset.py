"""The built-in data set: scenes drawn by `scenes`, written as H.264 mp4 files in the layout of Moments in Time.

    <root>/training/<category>/synthetic-<category>-<seed>.mp4       256x256, 30 frames a second, 90 frames
    <root>/validation/..., test/..., ood/...                         ood: a test outside the training's range
    <root>/trainingSet.csv, validationSet.csv, ...                   category/file.mp4,label,agree,disagree
    <root>/moments_categories.txt                                    name,index; written last: the set is whole

The scenes are drawn, not filmed: their figures say nothing about real eruptions, and are named `synthetic` wherever
they are shown. Every split has seeds of its own, and the same seed gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from giffy_ray.config import ConfigError, SyntheticConfig
from giffy_ray.core.media import encode_mp4
from giffy_ray.core.progress import Bar
from giffy_ray.core.storage import join, read_text, write_if_different, write_text
from giffy_ray.data.synthetic import scenes

NAME = "synthetic"
_SEEDS_PER_SPLIT = 1_000_000
_CLIPS_PER_TASK = 4
# Each look at what is done asks for all tasks in flight. Enough for a cluster to grow by.
_MAX_TASKS_IN_FLIGHT = 256


class Planned(NamedTuple):
    """One video that is to be: where, and from what."""

    split: str
    category: str
    seed: int

    @property
    def name(self) -> str:
        return f"{NAME}-{self.category}-{self.seed:08d}.mp4"

    @property
    def path(self) -> str:
        return f"{self.split}/{self.category}/{self.name}"


def plan(settings: SyntheticConfig, categories: Sequence[str] = scenes.CATEGORIES) -> list[Planned]:
    """Every video of the data set. Splits take their seeds from ranges that do not meet."""
    counts = {
        "training": settings.training_clips,
        "validation": settings.validation_clips,
        "test": settings.test_clips,
        "ood": settings.ood_clips,
    }

    def seeds() -> Iterator[tuple[str, int]]:
        for place, (split, count) in enumerate(counts.items()):
            first = (settings.seed * len(counts) + place) * _SEEDS_PER_SPLIT
            yield from ((split, first + clip) for clip in range(count))

    return [Planned(split, category, seed) for category in categories for split, seed in seeds()]


def video(planned: Planned) -> bytes:
    """Draws and encodes one video: the bytes of an mp4 file."""
    return encode_mp4(scenes.draw(planned.category, planned.seed, planned.split == "ood"), scenes.FPS)


def ensure(parent: str, settings: SyntheticConfig, categories: Sequence[str] = ()) -> str:
    """The root of the data set of these settings below `parent`; rendered by Ray tasks if it is not there.

    With `categories` (empty: all) no other one is rendered. Raises ConfigError for one that there is not.
    """
    root, drawn = root_of(parent, settings, categories)
    if not is_complete(root):
        render_all(root, plan(settings, drawn))
    return root


def is_complete(root: str) -> bool:
    return read_text(join(root, "moments_categories.txt")) is not None


def root_of(parent: str, settings: SyntheticConfig, categories: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Where `ensure` renders a data set, and the categories in it. Raises ConfigError."""
    unknown = [name for name in categories if name not in scenes.CATEGORIES]
    if unknown:
        raise ConfigError(
            f"data.categories: the built-in data set has {' and '.join(scenes.CATEGORIES)} (value {unknown[0]!r}); "
            "leave it out for both, or give data.root"
        )
    drawn = [name for name in scenes.CATEGORIES if name in categories or not categories]
    counts = (settings.training_clips, settings.validation_clips, settings.test_clips, settings.ood_clips)
    only = "" if len(drawn) == len(scenes.CATEGORIES) else f"-{'-'.join(drawn)}"
    version = f"v{scenes.VERSION}-{'-'.join(map(str, counts))}-seed{settings.seed}{only}"
    return join(parent, f"{NAME}-{version}"), drawn


def render_all(root: str, videos: list[Planned]) -> None:
    """Renders the videos on all CPUs of the cluster, then writes the lists."""
    import ray

    render = ray.remote(num_cpus=1)(_render)
    parts = [videos[first : first + _CLIPS_PER_TASK] for first in range(0, len(videos), _CLIPS_PER_TASK)]
    with Bar("rendering the built-in videos", len(videos), "videos") as bar:
        waiting: list[Any] = []
        for part in parts:
            waiting.append(render.remote(root, part))
            while len(waiting) >= _MAX_TASKS_IN_FLIGHT:
                done, waiting = ray.wait(waiting)
                bar.advance(sum(ray.get(done)))
        while waiting:
            done, waiting = ray.wait(waiting)
            bar.advance(sum(ray.get(done)))
    for split in dict.fromkeys(one.split for one in videos):
        lines = [f"{one.category}/{one.name},{one.category},3,0\n" for one in videos if one.split == split]
        write_text(join(root, f"{split}Set.csv"), "".join(lines))
    indices = [f"{category},{index}\n" for index, category in enumerate(scenes.CATEGORIES)]
    write_text(join(root, "moments_categories.txt"), "".join(indices))


def _render(root: str, videos: list[Planned]) -> int:
    for one in videos:
        # Another job may render the same at this moment, and list it: a video is there whole, and is not replaced.
        write_if_different(join(root, one.path), video(one))
    return len(videos)

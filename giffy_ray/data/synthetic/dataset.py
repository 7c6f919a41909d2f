"""Renders the built-in dataset: H.264 mp4 files of `scenes`, in the layout of Moments in Time.

    <root>/training/<category>/synthetic-<category>-<seed>.mp4       256x256, 30 frames per second, 90 frames
    <root>/validation/..., test/..., ood/...                         ood: out-of-distribution test
    <root>/trainingSet.csv, validationSet.csv, ...                   category/file.mp4,label,agree,disagree
    <root>/moments_categories.txt                                    name,index; written last, marks completion

The scenes are drawn, not filmed. Their metrics say nothing about real eruptions, so the dataset is named `synthetic`
wherever it is shown. Splits use disjoint ranges of seeds, and equal seeds give equal files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from giffy_ray.config import ConfigError, SyntheticConfig
from giffy_ray.core.media import encode_mp4
from giffy_ray.core.progress import ProgressBar
from giffy_ray.core.storage import join, read_text, write_if_changed, write_text
from giffy_ray.data.synthetic import scenes

NAME = "synthetic"
_SEEDS_PER_SPLIT = 1_000_000
_CLIPS_PER_TASK = 4
# Each ray.wait() call examines all tasks in flight, so their number is bounded. Leaves room for a growing cluster.
_MAX_TASKS_IN_FLIGHT = 256


class VideoSpec(NamedTuple):
    """Determines the file and the content of one video."""

    split: str
    category: str
    seed: int

    @property
    def name(self) -> str:
        return f"{NAME}-{self.category}-{self.seed:08d}.mp4"

    @property
    def path(self) -> str:
        return f"{self.split}/{self.category}/{self.name}"


def plan_videos(settings: SyntheticConfig, categories: Sequence[str] = scenes.CATEGORIES) -> list[VideoSpec]:
    """Lists every video of the dataset. The seed ranges of the splits are disjoint."""
    counts = {
        "training": settings.training_clips,
        "validation": settings.validation_clips,
        "test": settings.test_clips,
        "ood": settings.ood_clips,
    }
    videos = []
    for category in categories:
        for index, (split, count) in enumerate(counts.items()):
            first_seed = (settings.seed * len(counts) + index) * _SEEDS_PER_SPLIT
            videos += [VideoSpec(split, category, first_seed + clip) for clip in range(count)]
    return videos


def render_video(spec: VideoSpec) -> bytes:
    """Draws and encodes one video. Returns the bytes of an mp4 file."""
    return encode_mp4(scenes.draw_clip(spec.category, spec.seed, spec.split == "ood"), scenes.FPS)


def ensure_rendered(parent: str, settings: SyntheticConfig, categories: Sequence[str] = ()) -> str:
    """Returns the root of a dataset below `parent`, and renders it with Ray tasks if it does not exist.

    Args:
        parent: Folder of all built-in datasets.
        settings: Clip counts and seed.
        categories: Categories to render; empty for all.

    Raises:
        ConfigError: A category does not exist.
    """
    root, rendered_categories = resolve_root(parent, settings, categories)
    if not is_complete(root):
        render_all(root, plan_videos(settings, rendered_categories))
    return root


def is_complete(root: str) -> bool:
    return read_text(join(root, "moments_categories.txt")) is not None


def resolve_root(parent: str, settings: SyntheticConfig, categories: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Returns the root that `ensure_rendered` uses, and the categories in it. Raises ConfigError."""
    unknown = [name for name in categories if name not in scenes.CATEGORIES]
    if unknown:
        raise ConfigError(
            f"data.categories: the built-in dataset has {' and '.join(scenes.CATEGORIES)} (value {unknown[0]!r}); "
            "leave it out to use both, or set data.root"
        )
    selected = [name for name in scenes.CATEGORIES if name in categories or not categories]
    counts = (settings.training_clips, settings.validation_clips, settings.test_clips, settings.ood_clips)
    suffix = "" if len(selected) == len(scenes.CATEGORIES) else f"-{'-'.join(selected)}"
    version = f"v{scenes.VERSION}-{'-'.join(map(str, counts))}-seed{settings.seed}{suffix}"
    return join(parent, f"{NAME}-{version}"), selected


def render_all(root: str, videos: list[VideoSpec]) -> None:
    """Renders the videos on all CPUs of the cluster, then writes the lists."""
    import ray

    render = ray.remote(num_cpus=1)(_render)
    batches = [videos[first : first + _CLIPS_PER_TASK] for first in range(0, len(videos), _CLIPS_PER_TASK)]
    with ProgressBar("rendering the built-in videos", len(videos), "videos") as bar:
        pending: list[Any] = []
        for batch in batches:
            pending.append(render.remote(root, batch))
            while len(pending) >= _MAX_TASKS_IN_FLIGHT:
                ready, pending = ray.wait(pending)
                bar.advance(sum(ray.get(ready)))
        while pending:
            ready, pending = ray.wait(pending)
            bar.advance(sum(ray.get(ready)))
    for split in dict.fromkeys(spec.split for spec in videos):
        lines = [f"{spec.category}/{spec.name},{spec.category},3,0\n" for spec in videos if spec.split == split]
        write_text(join(root, f"{split}Set.csv"), "".join(lines))
    indices = [f"{category},{index}\n" for index, category in enumerate(scenes.CATEGORIES)]
    write_text(join(root, "moments_categories.txt"), "".join(indices))


def _render(root: str, videos: list[VideoSpec]) -> int:
    for spec in videos:
        # A concurrent job may render and list the same video. Files appear atomically, and equal ones are not replaced.
        write_if_changed(join(root, spec.path), render_video(spec))
    return len(videos)

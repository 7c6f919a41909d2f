"""Writes trained models for other tools: torch.export, ONNX, and the folder layout of Hugging Face.

An exported network is a function of any number of pairs of images, of any size that is a multiple of 8:

    start, end   float32 [batch, 3, height, width], sRGB, 0..1
    times        float32 [batch, frames], from 0 at the start to 1 at the end
    frames       float32 [batch, frames, 3, height, width], 0..1

It generates the most probable clip, the mean of the prior, and estimates motion at the size of the images.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from giffy_ray import models
from giffy_ray.config import Experiment, flatten, from_yaml, override
from giffy_ray.core.errors import InputError
from giffy_ray.core.packaged import packaged_models, packaged_path
from giffy_ray.core.storage import join, read_text
from giffy_ray.inference.pretrained import (
    CONFIG,
    CONFIG_FIELDS,
    FORMAT_VERSION,
    LIBRARY_NAME,
    WEIGHTS,
    is_hugging_face_folder,
    load_pretrained,
    open_pretrained,
)
from giffy_ray.models.between import Between
from giffy_ray.models.motion import MotionEstimator
from giffy_ray.training import checkpoint_format
from giffy_ray.training.learners import Learner
from giffy_ray.training.learners.between import BetweenLearner

ExportFormat = Literal["torch-export", "onnx", "huggingface"]

SIZE_MULTIPLE = 8  # of height and width
INPUT_NAMES, OUTPUT_NAME = ("start", "end", "times"), "frames"
METADATA_FILE = "giffy_ray.json"  # in a file of torch.export
_OPSET = 18  # at 20, GridSample gives wrong results in some runtimes
_SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx"}
_MIN_SIZE, _MAX_SIZE = 16, 8192  # of height and width
_MAX_COUNT = 4096  # of pairs and frames
_EXAMPLE_SHAPE = 2, 64, 80, 3  # pairs, height, width and frames that the exporter traces with
_CHECKED_SHAPE = 3, 56, 48, 5  # others, with which the result is checked
_MAX_ERROR = 1e-3  # a quarter of a level of 8 bits
_DIMENSION_NAMES = {"batch": "batch", "frames": "frames", "height": "height_eighths", "width": "width_eighths"}
_SYMBOL = re.compile(r"\bs\d+\b")  # torch's name of an unknown size
_FLOAT = 1  # ONNX's number of float32
_UNKNOWN = "Not recorded in the checkpoint."
_CARD = """---
license: apache-2.0
library_name: giffy_ray
pipeline_tag: image-to-video
tags:
- frame-interpolation
---

# {name}

Generates the video between two images. A model of giffy_ray (kind `{kind}`), with {parameters} million parameters.
{size}

## How to use it

```bash
pip install giffy_ray
giffy interpolate start.jpg end.jpg -o clip.mp4 --model PATH/TO/THIS/FOLDER
```

```python
from giffy_ray.inference.interpolator import Interpolator

interpolator = Interpolator.from_pretrained("PATH/TO/THIS/FOLDER")
interpolator("start.jpg", "end.jpg", frames=30).save("clip.mp4")
```

## Training

{training}

## Metrics

{metrics}

## Licence

Apache-2.0
"""


class ExportedNetwork(nn.Module):
    """The function that is exported; see the module.

    Args:
        network: The network of a model that estimates motion.
        latent: Width of its noise.
    """

    def __init__(self, network: Between, latent: int):
        super().__init__()
        self.network, self.latent = network, latent

    def forward(self, start: Tensor, end: Tensor, times: Tensor) -> Tensor:
        """Generates the frames at `times`."""
        noise = start.new_zeros(start.shape[0], self.latent)
        return self.network.generate(start, end, noise, times).transpose(1, 2).clamp(0, 1)


def export_model(source: str, output: str | PathLike[str], file_format: ExportFormat) -> Path:
    """Writes a trained model in another format. The output appears under its name only when it is complete.

    Args:
        source: See `Interpolator.from_pretrained`.
        output: A file, whose name ends in .pt2 (torch-export) or .onnx (onnx), or a folder (huggingface). It must not
            exist.
        file_format: `torch-export` and `onnx` are for models that estimate motion, `huggingface` is for any.

    Returns:
        The path of the output.

    Raises:
        InputError: The model cannot be loaded or exported, the output cannot be written, or a library is missing.
    """
    if file_format not in get_args(ExportFormat):
        raise InputError(f"format: must be one of {', '.join(get_args(ExportFormat))} (value {file_format!r})")
    path = _check_output(fspath(output), file_format)
    if file_format == "huggingface":
        exported = _load_for_folder(source)
        _write(path, lambda partial: _write_folder(exported, path.name, partial))
        return path
    if file_format == "onnx":
        _check_onnx_libraries()
    network, description = _load_network(source, file_format)
    write_file = _write_onnx if file_format == "onnx" else _write_torch_export
    _write(path, lambda partial: write_file(network, description, partial))
    return path


def load_network(source: str) -> ExportedNetwork:
    """Loads the network that `export_model` exports, to compare its results with those of the export.

    Raises:
        InputError: The model cannot be loaded, or does not estimate motion.
    """
    return _load_network(source, "torch-export")[0]


def _check_output(output: str, file_format: ExportFormat) -> Path:
    if "://" in output:
        raise InputError(f"output: must be local; export to a folder and copy it (value {output!r})")
    path = Path(output)
    suffix = _SUFFIXES.get(file_format)
    if suffix and path.suffix != suffix:
        raise InputError(f"output: the name of a file for {file_format} ends in {suffix} (value {output!r})")
    if path.is_symlink() or path.exists():
        raise InputError(f"output: exists already; delete it or choose another name (value {output!r})")
    return path


def _check_onnx_libraries() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"format: onnx needs {', '.join(missing)}; pip install 'giffy_ray[export]'")


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a path in a temporary folder, and moves what it has written to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".giffy_ray-", dir=path.parent) as folder:
            partial = Path(folder, path.name)
            write(partial)
            partial.rename(path)
    except OSError as error:
        raise InputError(f"output: {path} cannot be written: {error.strerror or error}") from error


def _load_network(source: str, file_format: ExportFormat) -> tuple[ExportedNetwork, dict[str, str]]:
    """Returns the network in evaluation mode, and what the file says about it."""
    learner, experiment = load_pretrained(source, torch.device("cpu"))
    clip, kind = experiment.clip, experiment.model.kind
    if not isinstance(learner, MotionEstimator):
        raise InputError(
            f"model: {source!r} ({kind}) generates only {clip.frames} frames of {clip.width}x{clip.height}, and "
            f"{file_format} is for models that estimate motion; export it as huggingface, or export between"
        )
    # As in `Interpolator`, without averaging over mirrored images.
    network = models.build(override(experiment, {"model.self_ensemble": 1}).model, clip)
    network.load_state_dict(cast(BetweenLearner, learner).module.eval_module.state_dict())
    description = {
        "giffy_ray.version": metadata.version("giffy_ray"),
        "giffy_ray.model": source if source in packaged_models() else kind,
        "giffy_ray.size_multiple": str(SIZE_MULTIPLE),
        "giffy_ray.inputs": (
            f"start, end: float32 [batch, 3, height, width], sRGB, 0..1; height and width are multiples of "
            f"{SIZE_MULTIPLE}. times: float32 [batch, frames], from 0 at the start to 1 at the end"
        ),
        "giffy_ray.outputs": "frames: float32 [batch, frames, 3, height, width], 0..1",
    }
    exported = ExportedNetwork(cast(Between, network), learner.latent)
    return exported.eval().requires_grad_(False), description


def _trace(network: ExportedNetwork) -> ExportedProgram:
    batch, frames = (Dim(_DIMENSION_NAMES[name], min=1, max=_MAX_COUNT) for name in ("batch", "frames"))
    height, width = (
        Dim(_DIMENSION_NAMES[name], min=_MIN_SIZE // SIZE_MULTIPLE, max=_MAX_SIZE // SIZE_MULTIPLE)
        for name in ("height", "width")
    )
    image = {0: batch, 2: SIZE_MULTIPLE * height, 3: SIZE_MULTIPLE * width}
    dynamic_shapes = {"start": image, "end": image, "times": {0: batch, 1: frames}}
    with _silence_exporter():
        return torch.export.export(network, make_example(*_EXAMPLE_SHAPE), dynamic_shapes=dynamic_shapes)


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hides warnings about the exporter's own code, and about libraries that it could export if they were installed."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


def make_example(batch: int, height: int, width: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random inputs of an exported network."""
    generator = torch.Generator().manual_seed(0)
    start, end = torch.rand(2, batch, 3, height, width, generator=generator)
    return start, end, torch.rand(batch, frames, generator=generator)


def _check_export(run: Callable[..., Any], network: ExportedNetwork) -> None:
    """Compares an export with the network, for inputs of other sizes than those that it was traced with."""
    example = make_example(*_CHECKED_SHAPE)
    with torch.no_grad():
        error = float((torch.as_tensor(run(*example)) - network(*example)).abs().max())
    if not error <= _MAX_ERROR:
        raise RuntimeError(f"the export generates frames that differ by {error:g} from those of the model; report this")


def _write_torch_export(network: ExportedNetwork, description: Mapping[str, str], path: Path) -> None:
    program = _trace(network)
    _check_export(program.module(), network)
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(description, indent=1)})


def _write_onnx(network: ExportedNetwork, description: Mapping[str, str], path: Path) -> None:
    import onnxruntime

    with _silence_exporter():
        program = torch.onnx.export(
            _trace(network),
            dynamo=True,
            opset_version=_OPSET,
            input_names=INPUT_NAMES,
            output_names=[OUTPUT_NAME],
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    _rename_dimensions(program.model)
    program.model.metadata_props.update(description)
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Any:
        return session.run(None, dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in inputs), strict=True)))[0]

    _check_export(run, network)


def _rename_dimensions(model: Any) -> None:
    """Replaces the exporter's symbols, such as s37, by the names of the dimensions.

    Args:
        model: An `onnx_ir.Model`.
    """
    import onnx_ir

    start, _, times = (value.shape for value in model.graph.inputs)
    sizes = {"batch": start[0], "height": start[2], "width": start[3], "frames": times[1]}
    # Height and width are expressions, 8*s61.
    names = {_SYMBOL.findall(size.value)[0]: _DIMENSION_NAMES[name] for name, size in sizes.items()}
    nodes = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs, *nodes):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(_rename_symbols(size, names) for size in value.shape)


def _rename_symbols(size: Any, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return _SYMBOL.sub(lambda match: names.get(match[0], match[0]), size.value)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns how operators become ONNX where torch's own translation is wrong, or right for one size only."""
    from onnxscript import opset18

    op: Any = opset18  # its functions build a graph, and accept what their types exclude

    def repeat_interleave(values: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
        """Repeats each element of a vector. onnxscript repeats the vector if the number is not a constant."""
        assert len(values.shape) == 1
        count = op.Reshape(repeats, op.Constant(value_ints=[-1]))
        columns = op.Expand(
            op.Unsqueeze(values, op.Constant(value_ints=[1])),
            op.Concat(op.Constant(value_ints=[1]), count, axis=0),
        )
        return op.Reshape(columns, op.Constant(value_ints=[-1]))

    def adaptive_avg_pool2d(features: Any, output_size: Sequence[int]) -> Any:
        """Averages by products with matrices, because ONNX has pooling for windows of fixed size only."""
        rows = average_matrix(features, 2, output_size[0])
        columns = average_matrix(features, 3, output_size[1])
        return op.MatMul(op.MatMul(rows, features), op.Transpose(columns, perm=[1, 0]))

    def average_matrix(features: Any, axis: int, windows: int) -> Any:
        """Returns float32 [windows, size]: 1 / length for the positions in a window, and 0 for others."""
        size = op.Squeeze(op.Shape(features, start=axis, end=axis + 1))
        index = op.Unsqueeze(op.Constant(value_ints=list(range(windows))), op.Constant(value_ints=[1]))
        first = op.Div(op.Mul(index, size), windows)
        end = op.Div(op.Add(op.Mul(op.Add(index, 1), size), windows - 1), windows)  # rounded up
        position = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
        is_inside = op.And(op.GreaterOrEqual(position, first), op.Less(position, end))
        return op.Div(op.Cast(is_inside, to=_FLOAT), op.Cast(op.Sub(end, first), to=_FLOAT))

    aten = torch.ops.aten
    return {
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    }


@dataclass(frozen=True)
class _FolderContent:
    """What goes into a folder of Hugging Face's layout."""

    learner: Learner
    experiment: Experiment
    training: str  # what the model was trained on, for the card
    metrics: str


def _load_for_folder(source: str) -> _FolderContent:
    with open_pretrained(source) as location:
        if is_hugging_face_folder(location):
            learner, experiment = load_pretrained(location, torch.device("cpu"))
            training = metrics = _UNKNOWN
        else:
            training, metrics = _describe_training(source, location)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary, "weights")
                checkpoint_format.export_weights(location, folder)
                learner, experiment = checkpoint_format.load_learner(str(folder))
    return _FolderContent(learner, experiment, training, metrics)


def _write_folder(content: _FolderContent, name: str, folder: Path) -> None:
    folder.mkdir()
    networks = content.learner.networks
    weights = {
        f"{network_name}.{key}": value
        for network_name, network in networks.items()
        for key, value in checkpoint_format.contiguous_weights(network).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    fields = flatten(content.experiment)
    config = {
        "library_name": LIBRARY_NAME,
        "format_version": FORMAT_VERSION,
        "model_type": content.experiment.model.kind,
        "experiment": {field: value for field, value in fields.items() if field.startswith(CONFIG_FIELDS)},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    parameters = sum(value.numel() for value in weights.values())
    (folder / "README.md").write_text(_format_card(content, " ".join(name.split()), parameters))


def _format_card(content: _FolderContent, name: str, parameters: int) -> str:
    clip, kind = content.experiment.clip, content.experiment.model.kind
    if isinstance(content.learner, MotionEstimator):
        size = "It estimates motion, and so generates any number of frames of any size."
    else:
        size = f"It generates clips of {clip.frames} frames of {clip.width}x{clip.height} pixels only."
    return _CARD.format(
        name=name,
        kind=kind,
        parameters=f"{parameters / 1e6:.2g}",
        size=size,
        training=content.training,
        metrics=content.metrics,
    )


def _describe_training(source: str, location: str) -> tuple[str, str]:
    """Returns what a checkpoint was trained on, and its metrics, as Markdown."""
    if source in packaged_models():
        return _read_published(source)
    state = checkpoint_format.read_train_state(location)
    if not state:  # a checkpoint without what only training needs
        return _UNKNOWN, _UNKNOWN
    experiment = from_yaml(read_text(join(location, checkpoint_format.EXPERIMENT)) or "")
    data = "videos that are not part of giffy_ray" if experiment.data.root else "the drawn videos built into giffy_ray"
    training = f"{state.get('steps_done', 0)} steps of {experiment.train.global_batch_size} clips, on {data}."
    metrics = state.get("metrics") or {}
    rows = [f"| {metric} | {value:.4g} |" for metric, value in sorted(metrics.items())]
    return training, "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else _UNKNOWN


def _read_published(name: str) -> tuple[str, str]:
    """Returns what the README of the pretrained models says before its table, and the table's row of one model."""
    readme = packaged_path("models", name).parent / "README.md"
    if not readme.is_file():
        return _UNKNOWN, _UNKNOWN
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", readme.read_text())  # links are relative to the README
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph and not paragraph.startswith("#")]
    tables = [index for index, paragraph in enumerate(paragraphs) if paragraph.startswith("|")]
    if not tables:
        return "\n\n".join(paragraphs[:1]) or _UNKNOWN, _UNKNOWN
    header, ruler, *rows = paragraphs[tables[0]].splitlines()
    own_rows = [row for row in rows if re.search(rf"`{re.escape(name)}/?`", row)]
    explanation = paragraphs[tables[0] + 1 : tables[0] + 2]
    metrics = "\n\n".join(["\n".join([header, ruler, *own_rows]), *explanation]) if own_rows else _UNKNOWN
    return "\n\n".join(paragraphs[: tables[0]]) or _UNKNOWN, metrics

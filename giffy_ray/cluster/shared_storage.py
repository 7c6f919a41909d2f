"""Checks that all nodes of a cluster see the same local folders, such as a mount of NFS, Lustre or EFS.

The driver writes a token into `storage`. Each node reads it and writes an answer next to it, which the driver reads.
A folder of videos may be read-only: each node compares the sizes of a sample of its files with the driver's.
"""

from __future__ import annotations

import os
import random
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from giffy_ray.config import VIDEO_LIST_SUFFIXES, ConfigError, Experiment
from giffy_ray.core.storage import PARTIAL_SUFFIX, delete_file, filesystem_of, is_local, join, read_text, write_text

TOKEN_FILE = "shared_storage"  # in a run's folder: a worker that can read it sees the same folder
VISIBILITY_TIMEOUT_S = 15.0  # for a file to become visible on other clients of a network file system
_POLL_INTERVAL_S = 0.2
_MAX_SAMPLED_FILES = 64
_MAX_SAMPLED_FOLDERS = 256
_MAX_FILES_PER_FOLDER = 8
_MAX_ENTRIES_PER_FOLDER = 2000


class Answer(NamedTuple):
    """A node's answer.

    Attributes:
        problem: What is wrong with the folder there, or an empty string.
        file: The file that the node has written.
    """

    problem: str
    file: str = ""


# Runs a function with its arguments on each node. Returns node name -> answer.
RunOnEachNode = Callable[..., Mapping[str, Answer]]


def local_folders(experiment: Experiment) -> dict[str, str]:
    """Returns field -> absolute path of `storage` and `data.root`, as far as they are local."""
    fields = {"storage": experiment.storage, "data.root": experiment.data.root}
    return {name: filesystem_of(value)[1] for name, value in fields.items() if value is not None and is_local(value)}


def check_nodes(experiment: Experiment, run_on_each_node: RunOnEachNode) -> None:
    """Checks that every node sees the driver's `storage` and `data.root`.

    Raises:
        ConfigError: Some nodes, which the message names, do not.
    """
    folders = local_folders(experiment)
    if "storage" in folders:
        _raise_problems("storage", experiment.storage, _exchange_tokens(folders["storage"], run_on_each_node))
    if "data.root" in folders:
        sizes = sample_files(folders["data.root"])
        answers = run_on_each_node(compare_files, folders["data.root"], sizes)
        _raise_problems("data.root", str(experiment.data.root), answers)


def check_growth(experiment: Experiment, max_nodes: int) -> None:
    """Checks that future nodes will share local folders, which only the user can state.

    Raises:
        ConfigError: A folder is local, and `cluster.shared_storage` is not set.
    """
    for name, folder in local_folders(experiment).items():
        if not experiment.cluster.shared_storage:
            raise ConfigError(
                f"{name}: the cluster has, or may grow to, {max_nodes} nodes, which may not share this local folder; "
                "use an address such as s3://bucket/giffy_ray, or set cluster.shared_storage=true if all nodes mount "
                f"the folder (value {folder!r})"
            )


def _raise_problems(name: str, folder: str, answers: Mapping[str, Answer]) -> None:
    problems = {node: answer.problem for node, answer in answers.items() if answer.problem}
    if problems:
        details = "; ".join(f"node {node}: {problem}" for node, problem in problems.items())
        raise ConfigError(
            f"{name}: {len(problems)} of {len(answers)} nodes do not share the folder {folder!r} with this one "
            f"({details}). Mount it on all nodes, or use an address such as s3://bucket/giffy_ray"
        )


def _exchange_tokens(folder: str, run_on_each_node: RunOnEachNode) -> dict[str, Answer]:
    text = uuid.uuid4().hex
    token = f"{folder}/.{text}{PARTIAL_SUFFIX}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(token).write_text(text)
    try:
        answers = dict(run_on_each_node(answer_token, token, text, VISIBILITY_TIMEOUT_S))
        deadline_s = time.monotonic() + VISIBILITY_TIMEOUT_S
        for node, answer in answers.items():
            problem = answer.problem or _await_text(answer.file, text, deadline_s)
            if problem and not answer.problem:
                answers[node] = Answer(f"its answer does not arrive here: {problem}")
        return answers
    finally:
        for leftover in Path(folder).glob(f".{text}*"):
            with suppress(OSError):  # it may be gone already
                leftover.unlink()


def answer_token(token: str, text: str, timeout_s: float) -> Answer:
    """Runs on a node: reads the token and writes an answer next to it."""
    problem = _await_text(token, text, time.monotonic() + timeout_s)
    if problem:
        return Answer(problem)
    answer = f"{token}.{uuid.uuid4().hex}"
    try:
        Path(answer).write_text(text)
    except OSError as error:
        return Answer(f"it cannot write there: {error.strerror or error}")
    return Answer("", answer)


def _await_text(path: str, text: str | None, deadline_s: float) -> str:
    """Waits until a file contains `text`, or any text if None. Returns an empty string, or why it does not."""
    while True:
        try:
            actual = Path(path).read_text()
            problem = "" if text in (None, actual) else f"{path} has other contents"
        except OSError as error:
            problem = f"{error.strerror or error}: {path}"
        if not problem or time.monotonic() > deadline_s:
            return problem
        time.sleep(_POLL_INTERVAL_S)


def sample_files(root: str) -> dict[str, int]:
    """Returns the sizes of some files in a folder of videos, or of a video list and files near it.

    Looks at a limited number of folders and of their entries, because a large folder takes too long to walk.

    Args:
        root: A local folder, or a list of videos (.csv, .parquet).

    Returns:
        Path relative to `root` -> size in bytes; the path of the list itself is empty.
    """
    if root.lower().endswith(VIDEO_LIST_SUFFIXES) and os.path.isfile(root):
        nearby = {f"../{name}": size for name, size in sample_files(os.path.dirname(root)).items()}
        return nearby | {"": os.path.getsize(root)}
    sizes: dict[str, int] = {}
    queue = deque([""])
    scanned = 0
    while queue and scanned < _MAX_SAMPLED_FOLDERS and len(sizes) < _MAX_SAMPLED_FILES:
        folder = queue.popleft()
        scanned += 1
        try:
            with os.scandir(os.path.join(root, folder)) as scan:
                entries = sorted(islice(scan, _MAX_ENTRIES_PER_FOLDER), key=lambda entry: entry.name)
        except OSError:
            continue  # preparing the dataset reports it
        # Hidden files may belong to one node only (.nfs0001, .snapshot).
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        queue.extend(os.path.join(folder, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False))
        files = [entry for entry in entries if entry.is_file()]
        for entry in random.Random(0).sample(files, min(_MAX_FILES_PER_FOLDER, len(files))):
            sizes[os.path.join(folder, entry.name)] = entry.stat().st_size
    return sizes


def compare_files(root: str, sizes: Mapping[str, int]) -> Answer:
    """Runs on a node: checks that it has the files of `sample_files`, with the same sizes."""
    if not os.path.exists(root):
        return Answer(f"No such file or directory: {root}")
    for name, expected_size in sizes.items():
        path = os.path.normpath(os.path.join(root, name)) if name else root
        try:
            size = os.stat(path).st_size
        except OSError as error:
            return Answer(f"{error.strerror or error}: {path}")
        if size != expected_size:
            return Answer(f"{path} has {size} bytes, not {expected_size}")
    return Answer("")


def write_token(experiment: Experiment, text: str) -> str | None:
    """Writes a token for `find_storage_problem` into the run's folder. Returns its text, or None for a bucket."""
    if not is_local(experiment.storage):
        return None
    write_text(_token_path(experiment), text)
    return text


def remove_token(experiment: Experiment, text: str) -> None:
    """Removes the token, unless another process has taken over the run and written its own."""
    path = _token_path(experiment)
    with suppress(OSError):  # the next start replaces it
        if is_local(path) and read_text(path) == text:
            delete_file(path)


def find_storage_problem(experiment: Experiment, token: str | None) -> str:
    """Returns why this node does not see the driver's `storage`, or an empty string.

    Each worker checks this when its training starts or restarts, so that nodes that join later are checked too.

    Args:
        experiment: The training.
        token: The return value of `write_token`.
    """
    if token is None:
        return ""
    # Any text will do: if another process has taken over the run, the run lock reports it.
    path = filesystem_of(_token_path(experiment))[1]
    problem = _await_text(path, None, time.monotonic() + VISIBILITY_TIMEOUT_S)
    return _describe_problem("storage", experiment.storage, problem) if problem else ""


def find_root_problem(root: str | None, sizes: Mapping[str, int]) -> str:
    """Returns why this node does not see the driver's videos, or an empty string.

    Args:
        root: `data.root`, or None if the training does not decode videos.
        sizes: The return value of `sample_files` on the driver.
    """
    if root is None:
        return ""
    problem = compare_files(filesystem_of(root)[1], sizes).problem
    return _describe_problem("data.root", root, problem) if problem else ""


def _token_path(experiment: Experiment) -> str:
    return join(experiment.run_dir, TOKEN_FILE)


def _describe_problem(name: str, folder: str, problem: str) -> str:
    return (
        f"{name}: node {socket.gethostname()} does not share the folder {folder!r} with the node that started the "
        f"training ({problem}); mount it there, or use an address such as s3://bucket/giffy_ray"
    )

"""Whether all nodes of a cluster see the same local folders, such as a mount of NFS, Lustre or EFS.

The driver leaves a token in the folder; each node reads it and leaves an answer beside it, which the driver reads.
A folder of videos may be read-only: there each node compares the sizes of a sample of its files with the driver's.
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
from giffy_ray.core.storage import PARTIAL, delete_file, filesystem_of, is_local, join, read_text, write_text

TOKEN = "shared_storage"  # the file of a run's folder by which a worker knows that it sees the same folder
# Clients of a network file system may take so long to see what another has written.
VISIBLE_S = 15.0
_LOOK_S = 0.2
_SAMPLED_FILES, _SAMPLED_FOLDERS, _FILES_OF_A_FOLDER, _ENTRIES_OF_A_FOLDER = 64, 256, 8, 2000


class Answer(NamedTuple):
    """Of a node: what is wrong with a folder there, an empty string for nothing, and the file that it has written."""

    problem: str
    file: str = ""


# Runs a function with its arguments on each node. Returns the answers by the nodes' names.
AskEach = Callable[..., Mapping[str, Answer]]


def local_folders(experiment: Experiment) -> dict[str, str]:
    """Field -> absolute path of `storage` and `data.root`, where these are local."""
    fields = {"storage": experiment.storage, "data.root": experiment.data.root}
    return {name: filesystem_of(value)[1] for name, value in fields.items() if value is not None and is_local(value)}


def check_each_node(experiment: Experiment, ask_each: AskEach) -> None:
    """Raises ConfigError, which names the nodes, where a node does not see the driver's `storage` and `data.root`."""
    folders = local_folders(experiment)
    if "storage" in folders:
        _refuse("storage", experiment.storage, _ask_for_token(folders["storage"], ask_each))
    if "data.root" in folders:
        facts = sample_files(folders["data.root"])
        _refuse("data.root", str(experiment.data.root), ask_each(compare_files, folders["data.root"], facts))


def refuse_growth(experiment: Experiment, most_nodes: int) -> None:
    """Raises ConfigError where nodes may join that need not share a local folder, unless the user says that they do."""
    for name, folder in local_folders(experiment).items():
        if not experiment.cluster.shared_storage:
            raise ConfigError(
                f"{name}: the cluster has {most_nodes} nodes, or may grow to them, which may not share the local "
                f"folder {folder!r}; give an address such as s3://bucket/giffy_ray, or cluster.shared_storage=true "
                "where all nodes mount this folder"
            )


def _refuse(name: str, folder: str, answers: Mapping[str, Answer]) -> None:
    problems = {node: answer.problem for node, answer in answers.items() if answer.problem}
    if problems:
        told = "; ".join(f"node {node}: {problem}" for node, problem in problems.items())
        raise ConfigError(
            f"{name}: {len(problems)} of {len(answers)} nodes do not share the folder {folder!r} with this one "
            f"({told}). Mount it on all nodes, or give an address such as s3://bucket/giffy_ray"
        )


def _ask_for_token(folder: str, ask_each: AskEach) -> dict[str, Answer]:
    text = uuid.uuid4().hex
    token = f"{folder}/.{text}{PARTIAL}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(token).write_text(text)
    try:
        answers = dict(ask_each(answer_token, token, text, VISIBLE_S))
        deadline_s = time.monotonic() + VISIBLE_S
        for node, answer in answers.items():
            problem = answer.problem or _await_text(answer.file, text, deadline_s)
            if problem and not answer.problem:
                answers[node] = Answer(f"its answer does not arrive here: {problem}")
        return answers
    finally:
        for left in Path(folder).glob(f".{text}*"):
            with suppress(OSError):  # a file that has gone is what we want
                left.unlink()


def answer_token(token: str, text: str, wait_s: float) -> Answer:
    """Runs on a node: reads the token and leaves an answer beside it."""
    problem = _await_text(token, text, time.monotonic() + wait_s)
    if problem:
        return Answer(problem)
    answer = f"{token}.{uuid.uuid4().hex}"
    try:
        Path(answer).write_text(text)
    except OSError as error:
        return Answer(f"it cannot write there: {error.strerror or error}")
    return Answer("", answer)


def _await_text(path: str, text: str | None, deadline_s: float) -> str:
    """Waits for a file to have this text, or any (None). Returns an empty string, or why it does not."""
    while True:
        try:
            found = Path(path).read_text()
            problem = "" if text in (None, found) else f"{path} holds something else"
        except OSError as error:
            problem = f"{error.strerror or error}: {path}"
        if not problem or time.monotonic() > deadline_s:
            return problem
        time.sleep(_LOOK_S)


def sample_files(root: str) -> dict[str, int]:
    """Sizes in bytes, by the path below `root`, of some files in it; of a list of videos (.csv, .parquet) its own too.

    A large folder is not walked: so many entries of so many folders are looked at.
    """
    if root.lower().endswith(VIDEO_LIST_SUFFIXES) and os.path.isfile(root):
        below = {f"../{name}": size for name, size in sample_files(os.path.dirname(root)).items()}
        return below | {"": os.path.getsize(root)}
    facts: dict[str, int] = {}
    waiting, looked = deque([""]), 0
    while waiting and looked < _SAMPLED_FOLDERS and len(facts) < _SAMPLED_FILES:
        folder, looked = waiting.popleft(), looked + 1
        try:
            with os.scandir(os.path.join(root, folder)) as listed:
                entries = sorted(islice(listed, _ENTRIES_OF_A_FOLDER), key=lambda entry: entry.name)
        except OSError:
            continue  # listing the videos reports it
        # Hidden files may belong to one node only (.nfs0001, .snapshot).
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        waiting.extend(os.path.join(folder, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False))
        files = [entry for entry in entries if entry.is_file()]
        for entry in random.Random(0).sample(files, min(_FILES_OF_A_FOLDER, len(files))):
            facts[os.path.join(folder, entry.name)] = entry.stat().st_size
    return facts


def compare_files(root: str, facts: Mapping[str, int]) -> Answer:
    """Runs on a node: whether the folder has the files of `sample_files`, of the same sizes."""
    if not os.path.exists(root):
        return Answer(f"No such file or directory: {root}")
    for name, size in facts.items():
        path = os.path.normpath(os.path.join(root, name)) if name else root
        try:
            found = os.stat(path).st_size
        except OSError as error:
            return Answer(f"{error.strerror or error}: {path}")
        if found != size:
            return Answer(f"{path} has {found} bytes, not {size}")
    return Answer("")


def leave_token(experiment: Experiment, text: str) -> str | None:
    """Puts a file into the run's folder, where `storage` is local, and returns its text: for `storage_problem`."""
    if not is_local(experiment.storage):
        return None
    write_text(join(experiment.storage, experiment.name, TOKEN), text)
    return text


def remove_token(experiment: Experiment, text: str) -> None:
    """Removes the file of `leave_token`, unless it is that of a process that has taken the run over since."""
    place = join(experiment.storage, experiment.name, TOKEN)
    with suppress(OSError):  # the next start replaces it
        if is_local(place) and read_text(place) == text:
            delete_file(place)


def storage_problem(experiment: Experiment, token: str | None) -> str:
    """Why this node does not see the `storage` of the node that started the training; an empty string where it does.

    A node that joins a cluster later is asked here, by each worker, when its training starts or restarts.
    """
    if token is None:
        return ""
    # Another text is that of a process that has taken the run over since; of that the lease tells.
    place = filesystem_of(join(experiment.storage, experiment.name, TOKEN))[1]
    problem = _await_text(place, None, time.monotonic() + VISIBLE_S)
    return _told("storage", experiment.storage, problem) if problem else ""


def root_problem(root: str | None, facts: Mapping[str, int]) -> str:
    """The same of the folder or list of the videos, where they are decoded in training. `facts`: of `sample_files`."""
    if root is None:
        return ""
    problem = compare_files(filesystem_of(root)[1], facts).problem
    return _told("data.root", root, problem) if problem else ""


def _told(name: str, folder: str, problem: str) -> str:
    return (
        f"{name}: node {socket.gethostname()} does not share the folder {folder!r} with the node that started the "
        f"training ({problem}); mount it there, or give an address such as s3://bucket/giffy_ray"
    )

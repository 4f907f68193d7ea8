"""
Checkpoints on the disk: written aside and renamed, read only if every byte is as it was written.

A checkpoint is a folder: ``state.json``, its arrays in ``state.safetensors``, and ``manifest.json`` with their checksums.
Transitions lie in ``replay_buffer/`` beside it, in files that are written once, named by their checksum, and shared by
checkpoints. No pickle.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray]

FORMAT = 2
FILES = ("state.json", "state.safetensors")
NAME = re.compile(r"[^.].*_(\d+)_steps")


class Checkpoint(NamedTuple):
    """What was read from a folder and found whole; without the transitions."""

    path: Path
    state: dict[str, Any]
    arrays: Arrays


def checkpoints(folder: str | Path) -> list[Path]:
    """
    :param folder: where a :class:`ResumeCallback` saved
    :return: the checkpoints in it, whole or not, newest first
    """
    found = [path for path in Path(folder).glob("*_steps") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def shard_file(folder: Path, sha256: str) -> Path:
    return folder / "replay_buffer" / f"{sha256}.safetensors"


def first_whole(paths: list[Path]) -> Checkpoint:
    """The first that is whole, with a warning of broken ones before it, or a ValueError with the reason for each."""
    refused = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        if refused:
            warnings.warn("\n".join([*refused, f"Going on with the one before: {path}"]))
        return checkpoint
    folder = str(paths[0].parent)
    raise ValueError("\n".join([f"save_path={folder!r} holds no whole checkpoint; mend it or choose another", *refused]))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of which every byte is checked, or raise a ValueError that says which file is broken and why."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this version reads format {FORMAT}")
        if set(manifest) != {"format", "sha256"} or set(manifest["sha256"]) != set(FILES):
            raise ValueError("manifest.json lists other files")
        contents = [read_whole(path / name, manifest["sha256"][name]) for name in FILES]
        state = json.loads(contents[0])
        if state["num_timesteps"] != steps_of(path):
            raise ValueError(f"it is of step {state['num_timesteps']}, its name says another")
        for shard in state["replay_buffer"]["shards"]:
            read_whole(shard_file(path.parent, shard["sha256"]), shard["sha256"])
        return Checkpoint(path, state, load(contents[1]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} refused: {error or type(error).__name__}") from error


def read_whole(path: Path, sha256: str) -> bytes:
    """The content of a file if its checksum is that; not mapped into memory, as it could change while it is in use."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path.name} is not as it was written (checksum)")
    return content


def write(path: Path, content: bytes) -> None:
    """Write a file down to the disk, or leave nothing behind."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_checkpoint(state: dict[str, Any], arrays: Arrays, path: Path) -> None:
    """Write a checkpoint aside and give it its name in one step, or leave nothing behind; one of that name is replaced."""
    aside = path.with_name(f".{path.name}.tmp")
    files = dict(zip(FILES, (json.dumps(state).encode(), save(arrays)), strict=True))
    manifest = {"format": FORMAT, "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, content in [*files.items(), ("manifest.json", json.dumps(manifest).encode())]:
            write(aside / name, content)
        sync(aside)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        sync(path.parent)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_shard(columns: Arrays, folder: Path) -> str:
    """Write some rows of each array of the replay buffer, or leave nothing behind; returns the checksum, which is the name."""
    content = save(columns)
    sha256 = hashlib.sha256(content).hexdigest()
    path = shard_file(folder, sha256)
    write(path.with_suffix(".tmp"), content)
    os.replace(path.with_suffix(".tmp"), path)
    sync(path.parent)
    return sha256


def read_shard(folder: Path, sha256: str) -> Arrays:
    """The rows that :func:`write_shard` wrote."""
    return load(read_whole(shard_file(folder, sha256), sha256))


def remove_unused_shards(folder: Path) -> None:
    """Remove the files that no checkpoint uses, of killed processes too."""
    used = set()
    for path in checkpoints(folder):
        try:
            used |= {shard["sha256"] for shard in json.loads((path / FILES[0]).read_bytes())["replay_buffer"]["shards"]}
        except (OSError, ValueError, KeyError, TypeError):
            return  # a broken checkpoint: nobody knows which files it needs
    for path in (folder / "replay_buffer").iterdir():
        if path.stem not in used:
            path.unlink()

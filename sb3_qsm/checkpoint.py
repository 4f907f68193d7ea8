"""
Checkpoints from which a run goes on as if it had never stopped.

What a run is made of, how it is taken apart into data, and how a new process is put where the old one was.
"""

import functools
import importlib.metadata
import inspect
import json
import platform
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_qsm.buffers import NStepDictReplayBuffer
from sb3_qsm.state import (
    Capture,
    arguments_of,
    callbacks_by_name,
    capture_env,
    capture_random,
    describe,
    env_layers,
    is_opaque,
    rebuild,
    restore,
    restore_attributes,
    restore_env,
    restore_random,
)
from sb3_qsm.storage import (
    Arrays,
    Checkpoint,
    checkpoints,
    publish,
    read_checkpoint,
    read_shard,
    remove_unused_shards,
    shard_file,
    steps_of,
    write_shard,
)

PACKAGES = ("numpy", "torch", "stable_baselines3", "gymnasium", "mujoco")
# Arguments that may differ from those of the checkpoint: the random states replace the seed, the others change no number
FREE_ARGUMENTS = ("tensorboard_log", "verbose", "seed", "device")
BUFFER_CLASSES = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, NStepDictReplayBuffer)
BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
LOGGER_ATTRIBUTES = ("name_to_value", "name_to_count", "name_to_excluded")


class CheckpointCallback(BaseCallback):
    """
    Callback for saving checkpoints from which ``QSM.resume`` goes on exactly, every ``save_freq`` calls to ``env.step()``
    (at the end of the rollout and its updates, where the transitions are stored).

    A disk that is full, or any other error of the system, does not end the training: it is warned about each time, the
    earlier checkpoints stay, and the next attempt follows ``save_freq`` calls later.

    .. warning::

      When using multiple environments, each call to  ``env.step()`` will effectively correspond to ``n_envs`` steps.
      To account for that, you can use ``save_freq = max(save_freq // n_envs, 1)``

    :param save_freq: Save checkpoints every ``save_freq`` call of the callback.
    :param save_path: Path to the folder where the checkpoints will be saved.
    :param name_prefix: Common prefix to the saved checkpoints, ``<name_prefix>_<steps>_steps``
    :param keep: How many checkpoints to keep; older ones are removed when a new one is complete
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when saving a checkpoint
    :raises ValueError: for arguments out of range, if ``save_path`` holds checkpoints of another run or ones later than the
        model, for a replay buffer of another kind, and, when saving, for a weight that is not finite
    :raises OSError: at the start of the training, if ``save_path`` cannot be written to
    """

    def __init__(
        self, save_freq: int, save_path: str | Path, name_prefix: str = "rl_model", keep: int = 2, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        for name, value in [("save_freq", save_freq), ("keep", keep)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if name_prefix.startswith(".") or Path(name_prefix).name != name_prefix:
            raise ValueError(f"name_prefix must be the start of a file name, not hidden, got {name_prefix!r}")
        self.save_freq = save_freq
        self.save_path = save_path
        self.name_prefix = name_prefix
        self.keep = keep
        self.n_calls_saved = 0
        # Files of the replay buffer, oldest first, and where the buffer stood when the last one was written
        self.shards: list[dict[str, Any]] = []
        self.shards_end = (0, 0)

    @property
    def folder(self) -> Path:
        return Path(self.save_path)

    def _init_callback(self) -> None:
        assert isinstance(self.model, OffPolicyAlgorithm)
        check_buffer(self.model.replay_buffer)
        (self.folder / "replay_buffer").mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*_steps.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        for path in checkpoints(self.folder):
            if steps_of(path) > self.model.num_timesteps:
                try:
                    read_checkpoint(path)
                except ValueError:
                    continue
                raise ValueError(
                    f"save_path={str(self.folder)!r} holds {path.name}, later than the model ({self.model.num_timesteps} "
                    "steps): go on from it with QSM.resume, or choose another save_path"
                )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        # Here the last transition is stored and learnt from; within the rollout it is not
        if self.n_calls // self.save_freq > self.n_calls_saved // self.save_freq:
            self.n_calls_saved = self.n_calls
            try:
                path = self.save()
            except OSError as error:
                warnings.warn(
                    f"no checkpoint at {self.model.num_timesteps} steps: {error}. Training goes on; the next attempt "
                    f"follows in {self.save_freq} calls, and until then the newest checkpoint is an earlier one."
                )
            else:
                if self.verbose >= 2:
                    print(f"Saving checkpoint to {path}")

    def save(self) -> Path:
        """
        Write a checkpoint now; to be called at the start of a rollout or between trainings.

        :return: its folder
        :raises ValueError: for a weight that is not finite; nothing is written
        :raises OSError: if the folder cannot be written to; what was there stays
        """
        model: Any = self.model
        arrays: Arrays = {}
        parameters = Capture(arrays).value("parameters", model.get_parameters())
        check_weights(arrays, model.num_timesteps)
        shards = self._write_shards(model.replay_buffer)
        self.shards, self.shards_end = shards, (model.replay_buffer.pos, model.num_timesteps)
        state = {
            "versions": versions(),
            "num_timesteps": model.num_timesteps,
            "arguments": constructor_arguments(model),
            "environment": describe_env(model.env),
            "parameters": parameters,
            "model": Capture(arrays, strict=False).attributes("model", model, leave_out=rebuilt_attributes(model)),
            "action_noise": Capture(arrays).value("action_noise", model.action_noise),
            "logger": Capture(arrays, strict=False).value("logger", {k: getattr(model.logger, k) for k in LOGGER_ATTRIBUTES}),
            "replay_buffer": {"pos": model.replay_buffer.pos, "full": model.replay_buffer.full, "shards": shards},
            "env": capture_env("env", model.env, arrays),
            "callbacks": capture_callbacks(self.locals.get("callback", self), arrays),
            "random": capture_random(arrays),
        }
        path = self.folder / f"{self.name_prefix}_{model.num_timesteps}_steps"
        publish(state, arrays, path)
        for old in [old for old in checkpoints(self.folder) if steps_of(old) <= model.num_timesteps][self.keep :]:
            shutil.rmtree(old)
        remove_unused_shards(self.folder)
        return path

    def _write_shards(self, buffer: ReplayBuffer) -> list[dict[str, Any]]:
        """
        :param buffer: buffer of which the rows that are new since the last call are written to a file
        :return: the files that make up the buffer, oldest first
        """
        filled = buffer.buffer_size if buffer.full else buffer.pos
        pos, num_timesteps = self.shards_end
        new = (self.model.num_timesteps - num_timesteps) // buffer.n_envs
        shards = list(self.shards)
        files_are_there = bool(shards) and all(shard_file(self.folder, shard).is_file() for shard in shards)
        if not files_are_there or not 0 <= new <= filled or (pos + new) % buffer.buffer_size != buffer.pos:
            new, shards = filled, []
        if new > 0:
            rows = np.arange(buffer.pos - new, buffer.pos) % buffer.buffer_size
            sha256 = write_shard({name: array[rows] for name, array in buffer_arrays(buffer)}, self.folder)
            shards.append({"sha256": sha256, "rows": new})
        while shards and sum(shard["rows"] for shard in shards[1:]) >= filled:  # the oldest is overwritten
            shards.pop(0)
        return shards


def check_weights(arrays: Arrays, num_timesteps: int) -> None:
    """
    :param arrays: parameters and states of the optimizers
    :param num_timesteps: when, in environment steps
    :raises ValueError: for the first one that is not finite
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite, got {array} after {num_timesteps} steps: training stops here, "
                "the checkpoints written before are untouched"
            )


def check_buffer(buffer: ReplayBuffer | None) -> None:
    """
    :param buffer: replay buffer of a model
    :raises ValueError: if checkpoints cannot hold it
    """
    if type(buffer) not in BUFFER_CLASSES or buffer.optimize_memory_usage:  # type: ignore[union-attr]
        names = ", ".join(cls.__name__ for cls in BUFFER_CLASSES)
        raise ValueError(
            f"checkpoints hold replay buffers of the classes {names}, without optimize_memory_usage; "
            f"got {type(buffer).__name__}"
        )


def buffer_arrays(buffer: ReplayBuffer) -> Iterator[tuple[str, np.ndarray]]:
    """
    :param buffer: replay buffer
    :return: name and array of each column, shape (buffer_size, n_envs, ...)
    """
    for name in BUFFER_ARRAYS:
        array = getattr(buffer, name)
        if isinstance(array, dict):
            yield from ((f"{name}.{key}", part) for key, part in array.items())
        else:
            yield name, array


def restore_buffer(buffer: ReplayBuffer, state: dict[str, Any], folder: Path) -> None:
    """
    :param buffer: buffer to fill
    :param state: its state, from ``state.json``
    :param folder: folder of the checkpoints
    """
    stop = state["pos"]
    total = sum(shard["rows"] for shard in state["shards"])
    for shard in state["shards"]:  # oldest first: later ones overwrite
        columns = read_shard(folder, shard)
        rows = np.arange(stop - total, stop - total + shard["rows"]) % buffer.buffer_size
        for name, array in buffer_arrays(buffer):
            array[rows] = columns[name]
        total -= shard["rows"]
    buffer.pos, buffer.full = stop, state["full"]


@functools.cache
def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """
    :param packages: names of packages
    :return: versions of this package and of those
    """
    found = {"sb3_qsm": (Path(__file__).parent / "version.txt").read_text().strip()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions() -> dict[str, str]:
    """
    :return: what must be the same for the same numbers
    """
    threads = str(th.get_num_threads())
    return {"python": platform.python_version(), "machine": platform.machine(), "threads": threads, **package_versions()}


def constructor_arguments(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """
    :param model: a model
    :return: JSON for each argument of its constructor but the environment
    """
    names = [name for name in inspect.signature(type(model).__init__).parameters if hasattr(model, name)]
    values = {name: getattr(model, name) for name in names if name != "env"}
    aliases = {policy_class: name for name, policy_class in reversed(model.policy_aliases.items())}
    values["policy"] = aliases.get(model.policy_class, model.policy_class)
    values["device"] = str(model.device)
    if isinstance(model.action_noise, VectorizedActionNoise):  # SB3 has wrapped the user's
        values["action_noise"] = model.action_noise.base_noise
    if isinstance(model.train_freq, TrainFreq):
        values["train_freq"] = (model.train_freq.frequency, model.train_freq.unit.value)
    return {name: describe(value) for name, value in values.items()}


def rebuilt_attributes(model: OffPolicyAlgorithm) -> tuple[str, ...]:
    """
    :param model: a model
    :return: names of the attributes that come from the constructor, or that checkpoints hold elsewhere
    """
    return (*model._excluded_save_params(), *arguments_of(model))


def resume_arguments(state: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param state: state of a checkpoint
    :param kwargs: arguments given by the user
    :return: arguments with which to build the model
    :raises ValueError: if one is missing that only the user can give
    """
    missing = [name for name, data in state["arguments"].items() if is_opaque(data) and name not in kwargs]
    if missing:
        raise ValueError(
            f"resume needs these arguments again, as a checkpoint holds no functions, classes or objects: {', '.join(missing)}"
        )
    return {name: rebuild(data) for name, data in state["arguments"].items() if name not in kwargs} | kwargs


def describe_env(env: VecEnv) -> dict[str, Any]:
    """
    :param env: vectorised environment
    :return: what tells it from others
    """
    spec = env.unwrapped.envs[0].spec if isinstance(env.unwrapped, DummyVecEnv) else None
    return {
        "id": getattr(spec, "id", None),
        "kwargs": describe({key: value for key, value in getattr(spec, "kwargs", {}).items() if key != "render_mode"}),
        "n_envs": env.num_envs,
        "observation_space": str(env.observation_space),
        "action_space": str(env.action_space),
        "layers": [name for name, _ in env_layers(env)],
    }


def capture_callbacks(root: BaseCallback, arrays: Arrays) -> dict[str, Any]:
    """
    :param root: the callback of a training
    :param arrays: filled with the arrays
    :return: by callback: the attributes that are data and not set by its constructor, and the state of its environments
    """
    found = {}
    for name, callback in callbacks_by_name(root).items():
        path, leave_out = f"callbacks.{name}", (*arguments_of(callback), "model", "parent", "locals", "globals")
        attributes = Capture(arrays, strict=False).attributes(path, callback, leave_out=leave_out)
        envs = {key: value for key, value in vars(callback).items() if isinstance(value, VecEnv)}
        env_states = {key: capture_env(f"{path}.{key}", value, arrays) for key, value in envs.items()}
        found[name] = {"attributes": attributes, "envs": env_states}
    return found


def restore_callbacks(root: BaseCallback, data: dict[str, Any], arrays: Arrays) -> None:
    """
    :param root: the callback of a training
    :param data: JSON from :func:`capture_callbacks`
    :param arrays: the arrays that go with it
    """
    callbacks = callbacks_by_name(root)
    if missing := sorted(set(data) - set(callbacks)):
        warnings.warn(f"the checkpoint holds the state of callbacks that are not there: {', '.join(missing)}")
    for name in callbacks.keys() & data.keys():
        callback = callbacks[name]
        restore_attributes(callback, data[name]["attributes"], arrays, leave_out=arguments_of(callback))
        for key, state in data[name]["envs"].items():
            env = getattr(callback, key, None)
            if isinstance(env, VecEnv) and state["opaque"] is None:
                env.reset()
                restore_env(env, state, arrays)


def restore_model(model: OffPolicyAlgorithm, checkpoint: Checkpoint) -> None:
    """
    Put a model that was just built where the checkpoint's was. Callbacks, logger, noise and random states follow when the
    training goes on, see :func:`continue_training`.

    :param model: model with the arguments and the environment of the checkpoint's
    :param checkpoint: from :func:`newest_checkpoint`
    :raises ValueError: if arguments or environment are others; the message names the first
    """
    path, state, arrays = checkpoint
    check_buffer(model.replay_buffer)
    assert model.replay_buffer is not None and model.env is not None
    for name, saved, given in [
        *((name, state["environment"].get(name), value) for name, value in describe_env(model.env).items()),
        *((name, state["arguments"].get(name), value) for name, value in constructor_arguments(model).items()),
    ]:
        if saved != given and name not in FREE_ARGUMENTS:
            raise ValueError(
                f"{name} must be that of the checkpoint {path}, {json.dumps(saved)}, got {json.dumps(given)}: "
                "to go on in another way, use QSM.load"
            )
    here, there = versions(), state["versions"]
    if changed := [f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key]]:
        warnings.warn(f"the run goes on, but perhaps not bit for bit: {', '.join(changed)}")
    model.set_parameters(restore(state["parameters"], arrays), device=model.device)
    restore_attributes(model, state["model"], arrays, leave_out=rebuilt_attributes(model))
    restore_buffer(model.replay_buffer, state["replay_buffer"], path.parent)
    model.env.reset()
    opaque = restore_env(model.env, state["env"], arrays)
    if opaque is not None:
        warnings.warn(
            f"the state of the environment cannot be restored ({opaque}): the run goes on with a new episode, not bit for bit"
        )
        model._last_obs = None  # learn() resets the environment, and cuts the returns that would reach over it
        for callback in state["callbacks"].values():  # which makes the file of the last transition out of date
            callback["attributes"].pop("shards", None)


def continue_training(model: OffPolicyAlgorithm, callback: BaseCallback, checkpoint: Checkpoint) -> None:
    """
    The last step of a resume, when ``learn`` has its callbacks and logger.

    :param model: model, after :func:`restore_model`
    :param callback: the callback of the training
    :param checkpoint: the same checkpoint
    :raises ValueError: if ``learn`` starts from zero instead of going on
    """
    _, state, arrays = checkpoint
    if model.num_timesteps != state["num_timesteps"]:
        raise ValueError(
            "reset_num_timesteps must be False after QSM.resume: "
            "model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)"
        )
    if model._total_timesteps != state["model"]["_total_timesteps"]:
        warnings.warn(
            f"the run was to end at {state['model']['_total_timesteps']} steps, it will now end at {model._total_timesteps}; "
            "schedules follow the new end"
        )
    restore(state["action_noise"], arrays, model.action_noise)
    for name, value in restore(state["logger"], arrays).items():
        getattr(model.logger, name).update(value)
    restore_callbacks(callback, state["callbacks"], arrays)
    restore_random(state["random"], arrays)

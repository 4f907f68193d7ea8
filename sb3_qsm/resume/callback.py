"""
What a run is made of, when it is saved, and how a new process is put where the old one was.
"""

import importlib.metadata
import json
import platform
import shutil
import warnings
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_qsm.resume._state import (
    Capture,
    OpaqueError,
    arguments_of,
    callbacks_by_name,
    capture_env,
    capture_random,
    describe,
    env_layers,
    restore,
    restore_attributes,
    restore_env,
    restore_random,
)
from sb3_qsm.resume._storage import (
    Arrays,
    Checkpoint,
    checkpoints,
    first_whole,
    read_shard,
    remove_unused_shards,
    shard_file,
    steps_of,
    write_checkpoint,
    write_shard,
)

PACKAGES = ("numpy", "torch", "stable_baselines3", "gymnasium", "mujoco")
# Arguments that may differ from those of the checkpoint, as they change no number
FREE_ARGUMENTS = ("tensorboard_log", "verbose", "device")
# Arrays of the replay buffer in which a transition is a row that stays as it was added
COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
# Attributes that belong to one call of learn, not to the run
OF_ONE_CALL = ("start_time", "_total_timesteps", "_num_timesteps_at_start")
CALLBACK_ATTRIBUTES = ("model", "parent", "locals", "globals", "_checkpoint", "_shards", "_shards_end")
LOGGER_ATTRIBUTES = ("name_to_value", "name_to_count", "name_to_excluded")


class ResumeCallback(BaseCallback):
    """
    Callback for runs that survive their process: it saves checkpoints every ``save_freq`` calls to ``env.step()`` and, when
    ``save_path`` holds one as the training starts, puts the run where it was. The same program started again goes on until
    ``total_timesteps`` of the whole run, bit for bit::

        model = SAC("MlpPolicy", "Pendulum-v1")
        model.learn(100_000, callback=ResumeCallback(save_freq=1000, save_path="checkpoints"))

    For any off-policy algorithm of SB3. In a list of callbacks it is best the first: those behind it find what they had
    gathered when their own training starts. One call to ``learn`` is one run; each run needs a folder of its own.

    A checkpoint is taken between rollouts, where the last transition is stored and learnt from, and when the run ends. A disk
    that is full does not end the training: it is warned about, and the next attempt follows ``save_freq`` calls later.

    .. warning::

      When using multiple environments, each call to  ``env.step()`` will effectively correspond to ``n_envs`` steps.
      To account for that, you can use ``save_freq = max(save_freq // n_envs, 1)``

    :param save_freq: Save checkpoints every ``save_freq`` call of the callback.
    :param save_path: Path to the folder where the checkpoints will be saved.
    :param name_prefix: Common prefix to the saved checkpoints, ``<name_prefix>_<steps>_steps``
    :param keep: How many checkpoints to keep; older ones are removed when a new one is complete
    :param verbose: Verbosity level: 0 for no output, 1 for where a run goes on, 2 for each checkpoint, too
    :raises ValueError: for arguments out of range. When the training starts: if the program is not the one that began the run
        (the message names the first argument that differs), if ``save_path`` holds only broken checkpoints or SB3's, and for
        an algorithm whose state cannot be saved. When saving: for a weight that is not finite
    :raises OSError: at the start of the training, if ``save_path`` cannot be written to
    """

    def __init__(
        self, save_freq: int, save_path: str | Path, name_prefix: str = "rl_model", keep: int = 2, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        for name, value in [("save_freq", save_freq), ("keep", keep)]:
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if name_prefix.startswith(".") or Path(name_prefix).name != name_prefix:
            raise ValueError(f"name_prefix must be the start of a file name, not hidden, got {name_prefix!r}")
        self.save_freq = save_freq
        self.save_path = save_path
        self.name_prefix = name_prefix
        self.keep = keep
        # Where the run goes on, until the last of its state is back: callbacks and random numbers have to wait for the others
        self._checkpoint: Checkpoint | None = None
        self._n_calls_saved = 0
        self._rollout_is_new = False
        # Files of the replay buffer, oldest first, and its position and the steps when the last one was written
        self._shards: list[dict[str, Any]] = []
        self._shards_end = (0, 0)

    def _init_callback(self) -> None:
        _check_model(self.model)
        folder = Path(self.save_path)
        paths = checkpoints(folder)
        if not paths and (foreign := sorted(path.name for path in folder.glob("*_steps.zip"))):
            raise ValueError(
                f"save_path={str(folder)!r} holds checkpoints of SB3's CheckpointCallback ({foreign[0]}), which do not hold "
                f"a whole run: load one with {type(self.model).__name__}.load, and choose another save_path"
            )
        (folder / "replay_buffer").mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*_steps.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        # A model that is further than the checkpoints has written them itself, in an earlier call of learn
        if later := [path for path in paths if steps_of(path) > self.model.num_timesteps]:
            if self.n_calls > 0:
                raise ValueError(
                    f"save_path={str(folder)!r} holds {later[0].name} of an earlier call to learn with this callback, "
                    f"the model is at step {self.model.num_timesteps}: a new ResumeCallback goes on with that run, another "
                    "save_path begins a second one"
                )
            self._restore(first_whole(later))

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put model, replay buffer and environment where they were; ``learn`` has reset them, as it does."""
        model: Any = self.model
        path, state, arrays = checkpoint
        for name, given in _describe_run(model).items():
            saved = state["run"].get(name)
            if saved != given and name == "seed":
                warnings.warn(f"seed={given} is without effect: the run goes on with the random numbers of seed={saved}")
            elif saved != given:
                raise ValueError(
                    f"{name} must be that of the checkpoint {path}, {json.dumps(saved)}, got {json.dumps(given)}: start the "
                    "program that began the run, or choose another save_path for another run. To go on in another way, "
                    f"save the model there and {type(model).__name__}.load it here"
                )
        here, there = _versions(model), state["versions"]
        if changed := [f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key]]:
            warnings.warn(f"the run goes on, but perhaps not bit for bit: {', '.join(changed)}")
        if model._total_timesteps != state["total_timesteps"]:
            warnings.warn(
                f"the run was to end at {state['total_timesteps']} steps, it will now end at {model._total_timesteps}; "
                "schedules follow the new end"
            )
        if self.verbose >= 1:
            print(f"Going on from {path}")

        parameters = restore(state["parameters"], arrays)
        with th.no_grad():  # in place: optimizers hold them
            for name in model._get_torch_save_params()[1]:
                recursive_getattr(model, name).copy_(parameters.pop(name))
        model.set_parameters(parameters, device=model.device)
        restore_attributes(model, state["model"], arrays)
        model._num_timesteps_at_start = model.num_timesteps
        if model.use_sde:
            restore_attributes(model.actor.action_dist, state["exploration"], arrays)
        restore(state["action_noise"], arrays, model.action_noise)
        for name, values in state["logger"].items():
            getattr(model.logger, name).update({key: restore(value, arrays) for key, value in values.items()})

        buffer, rows = model.replay_buffer, state["replay_buffer"]
        restore_attributes(buffer, rows["attributes"], arrays)
        stop = buffer.pos - sum(shard["rows"] for shard in rows["shards"])
        for shard in rows["shards"]:  # oldest first: later ones overwrite
            start, stop = stop, stop + shard["rows"]
            columns = read_shard(path.parent, shard["sha256"])
            for name, array in _buffer_columns(buffer):
                array[np.arange(start, stop) % buffer.buffer_size] = columns[name]
        self._shards, self._shards_end = rows["shards"], (buffer.pos, model.num_timesteps)

        opaque = restore_env(model.env, state["env"], arrays)
        if opaque is not None:
            warnings.warn(
                f"the environment has a state that cannot be restored ({opaque}): the run goes on with a new episode, "
                "not bit for bit"
            )
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
            if model._vec_normalize_env is not None:
                model._last_original_obs = model._vec_normalize_env.get_original_obs()
            # No return over several steps may reach into it; the file of the last transition is out of date
            newest = buffer.pos - 1
            buffer.timeouts[newest] = np.maximum(buffer.timeouts[newest], 1 - buffer.dones[newest])
            self._shards = []
        self._checkpoint = checkpoint

    def _on_training_start(self) -> None:
        if self.parent is not None:  # which passes on no start of a rollout
            raise ValueError(f"callback must be ResumeCallback or a list with it, got one inside {type(self.parent).__name__}")
        if self._checkpoint is not None:
            _, state, arrays = self._checkpoint
            _restore_callbacks(self.locals.get("callback", self), state["callbacks"], arrays)

    def _restore_random(self) -> None:
        """Last of all, since the start of other callbacks may draw random numbers."""
        if self._checkpoint is not None:
            restore_random(self._checkpoint.state["random"], self._checkpoint.arrays)
            self._checkpoint = None

    def _on_rollout_start(self) -> None:
        # Here the last transition is stored and learnt from; within the rollout it is not
        self._restore_random()
        if self.n_calls // self.save_freq > self._n_calls_saved // self.save_freq:
            self._try_to_save()

    def _on_step(self) -> bool:
        self._rollout_is_new = False
        return True

    def _on_rollout_end(self) -> None:
        self._rollout_is_new = True

    def _on_training_end(self) -> None:
        self._restore_random()
        # A run that a callback has ended is not complete, and its last transition not stored
        if self._rollout_is_new and self.model.num_timesteps >= self.model._total_timesteps:
            self._try_to_save()

    def _try_to_save(self) -> None:
        self._n_calls_saved, self._rollout_is_new = self.n_calls, False
        try:
            self._save()
        except OSError as error:
            warnings.warn(
                f"no checkpoint at {self.model.num_timesteps} steps: {error}. Training goes on; the next attempt "
                f"follows in {self.save_freq} calls, and until then the newest checkpoint is an earlier one."
            )

    def _save(self) -> None:
        model: Any = self.model
        folder = Path(self.save_path)
        arrays: Arrays = {}
        variables = model._get_torch_save_params()[1]
        values = {**model.get_parameters(), **{name: recursive_getattr(model, name) for name in variables}}
        parameters = Capture(arrays).value("parameters", values)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{name} must be finite, got {array} after {model.num_timesteps} steps: training stops here, "
                    "the checkpoints written before are untouched"
                )
        arguments = arguments_of(model)
        elsewhere = (*model._excluded_save_params(), *arguments, *(f"_{name}" for name in arguments), *variables, *OF_ONE_CALL)
        some = Capture(arrays, strict=False)
        self._write_shards(model.replay_buffer)
        state = {
            "versions": _versions(model),
            "run": _describe_run(model),
            "num_timesteps": model.num_timesteps,
            "total_timesteps": model._total_timesteps,
            "parameters": parameters,
            "model": some.attributes("model", model, leave_out=elsewhere),
            "exploration": some.attributes("exploration", model.actor.action_dist) if model.use_sde else None,
            "action_noise": Capture(arrays).value("action_noise", model.action_noise),
            "logger": {
                name: some.attributes(name, SimpleNamespace(**getattr(model.logger, name))) for name in LOGGER_ATTRIBUTES
            },
            "replay_buffer": {
                "attributes": Capture(arrays).attributes("replay_buffer", model.replay_buffer, leave_out=COLUMNS),
                "shards": self._shards,
            },
            "env": capture_env("env", model.env, arrays),
            "callbacks": _capture_callbacks(self.locals.get("callback", self), arrays),
            "random": capture_random(arrays),
        }
        path = folder / f"{self.name_prefix}_{model.num_timesteps}_steps"
        write_checkpoint(state, arrays, path)
        for old in [old for old in checkpoints(folder) if steps_of(old) <= model.num_timesteps][self.keep :]:
            shutil.rmtree(old)
        remove_unused_shards(folder)
        if self.verbose >= 2:
            print(f"Saving checkpoint to {path}")

    def _write_shards(self, buffer: ReplayBuffer) -> None:
        """Write the rows that are new since the last call to a file, or all of them if the earlier files do not lead here."""
        folder = Path(self.save_path)
        filled = buffer.buffer_size if buffer.full else buffer.pos
        pos, num_timesteps = self._shards_end
        new = (self.model.num_timesteps - num_timesteps) // buffer.n_envs
        shards = list(self._shards)
        files_are_there = bool(shards) and all(shard_file(folder, shard["sha256"]).is_file() for shard in shards)
        if not files_are_there or not 0 <= new <= filled or (pos + new) % buffer.buffer_size != buffer.pos:
            new, shards = filled, []
        if new > 0:
            rows = np.arange(buffer.pos - new, buffer.pos) % buffer.buffer_size
            sha256 = write_shard({name: array[rows] for name, array in _buffer_columns(buffer)}, folder)
            shards.append({"sha256": sha256, "rows": new})
        while shards and sum(shard["rows"] for shard in shards[1:]) >= filled:  # the oldest is overwritten
            shards.pop(0)
        self._shards, self._shards_end = shards, (buffer.pos, self.model.num_timesteps)


def _check_model(model: BaseAlgorithm) -> None:
    """Raise a ValueError if checkpoints cannot hold a model."""
    name = type(model).__name__
    if not isinstance(model, OffPolicyAlgorithm) or not isinstance(model.replay_buffer, ReplayBuffer):
        raise ValueError(f"ResumeCallback resumes off-policy algorithms, which have a replay buffer (such as SAC), got {name}")
    if model.replay_buffer.optimize_memory_usage:
        raise ValueError("optimize_memory_usage must be False for ResumeCallback, got True")
    try:
        Capture({}).attributes("replay_buffer", model.replay_buffer, leave_out=COLUMNS)
        Capture({}).value("action_noise", model.action_noise)
    except OpaqueError as error:
        raise ValueError(
            "replay_buffer_class and action_noise must hold numbers only, beside the transitions, for ResumeCallback, "
            f"got {type(model.replay_buffer).__name__} and {type(model.action_noise).__name__}: {error}"
        ) from error


def _buffer_columns(buffer: ReplayBuffer) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each column of a replay buffer, shape (buffer_size, n_envs, ...)."""
    for name in COLUMNS:
        array = getattr(buffer, name)
        if isinstance(array, dict):
            yield from ((f"{name}.{key}", part) for key, part in array.items())
        else:
            yield name, array


def _versions(model: BaseAlgorithm) -> dict[str, str]:
    """What must be the same for the same numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": str(th.get_num_threads())}
    for package in (*PACKAGES, type(model).__module__.partition(".")[0]):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _describe_run(model: Any) -> dict[str, Any]:
    """JSON for what tells the run of a model from others: algorithm, environment, arguments."""
    env = model.env
    spec = env.unwrapped.envs[0].spec if isinstance(env.unwrapped, DummyVecEnv) else None
    kwargs = {key: value for key, value in getattr(spec, "kwargs", {}).items() if key != "render_mode"}
    described = {
        "algorithm": type(model),
        "env_id": getattr(spec, "id", None),
        "env_kwargs": kwargs,
        "n_envs": env.num_envs,
        "observation_space": str(env.observation_space),
        "action_space": str(env.action_space),
        "env_wrappers": [name for name, _ in env_layers(env)],
        # SB3 keeps some under a name of its own, as _stats_window_size and policy_class
        **{name: getattr(model, name, getattr(model, f"_{name}", None)) for name in arguments_of(model)},
        "policy": model.policy_class,
    }
    return {name: describe(value) for name, value in described.items() if name not in ("self", "env", *FREE_ARGUMENTS)}


def _capture_callbacks(root: BaseCallback, arrays: Arrays) -> dict[str, Any]:
    """By callback: its attributes that are data and not set by its constructor, and the state of its environments."""
    found = {}
    for name, callback in callbacks_by_name(root).items():
        path, leave_out = f"callbacks.{name}", (*arguments_of(callback), *CALLBACK_ATTRIBUTES)
        attributes = Capture(arrays, strict=False).attributes(path, callback, leave_out=leave_out)
        envs = {key: value for key, value in vars(callback).items() if isinstance(value, VecEnv)}
        env_states = {key: capture_env(f"{path}.{key}", value, arrays) for key, value in envs.items()}
        found[name] = {"attributes": attributes, "envs": env_states}
    return found


def _restore_callbacks(root: BaseCallback, data: dict[str, Any], arrays: Arrays) -> None:
    """Give the callbacks of a training what :func:`_capture_callbacks` took."""
    callbacks = callbacks_by_name(root)
    if missing := sorted(set(data) - set(callbacks)):
        warnings.warn(f"the checkpoint holds the state of callbacks that are not there: {', '.join(missing)}")
    for name in callbacks.keys() & data.keys():
        callback = callbacks[name]
        restore_attributes(callback, data[name]["attributes"], arrays)
        for key, state in data[name]["envs"].items():
            env = getattr(callback, key, None)
            if isinstance(env, VecEnv) and state["opaque"] is None:
                env.reset()
                restore_env(env, state, arrays)

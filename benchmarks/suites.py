"""From a suite file to a checked list of runs, so that nothing starts that cannot finish."""

import importlib
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import gymnasium as gym
import torch.nn as nn
import yaml
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise

from . import environments  # noqa: F401  (registers its environments)
from .algorithms import algorithm_class

SUITES = Path(__file__).parent / "suites"
# This checkout, None where the package is installed as sb3_qsm.benchmarks
ROOT = Path(__file__).parent.parent if __package__ == "benchmarks" else None
NUMBER_KEYS = ("n_timesteps", "eval_freq", "n_eval_episodes")
SUITE_KEYS = (*NUMBER_KEYS, "seeds", "tasks", "algorithms")
NOISE: dict[str, Callable[..., ActionNoise]] = {
    "normal": NormalActionNoise,
    "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise,
}
# Keys of rl-zoo that are no constructor arguments. The suite sets n_timesteps: every algorithm gets the same budget.
ZOO_KEYS = {"n_timesteps", "n_envs", "env_wrapper", "noise_type", "noise_std"}
RUNNER_KEYS = {"self", "env", "seed", "verbose", "tensorboard_log", "stats_window_size", "_init_setup_model"}


@dataclass(frozen=True)
class Run:
    """
    One training run: everything that decides its numbers, apart from code and machine.

    :param suite: name or path of the suite, as typed
    :param task: environment id
    :param algorithm: name in ``ALGORITHMS``, with or without a label
    :param seed: seed of the training run; the evaluation has its own, the same for all
    :param n_timesteps: environment steps of training
    :param eval_freq: environment steps between two evaluations
    :param n_eval_episodes: episodes per evaluation, for deterministic and for sampled actions each
    :param hyperparams: rl-zoo hyperparameters as written in the file
    """

    suite: str
    task: str
    algorithm: str
    seed: int
    n_timesteps: int
    eval_freq: int
    n_eval_episodes: int
    hyperparams: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the result lies, relative to the folder of all runs."""
        return Path(Path(self.suite).stem, self.task.replace("/", "-").replace(":", "-"), self.algorithm, f"seed{self.seed}")

    @property
    def defaults(self) -> dict[str, str]:
        """Arguments of the algorithm that ``hyperparams`` leaves to its constructor, as text."""
        arguments = constructor_arguments(algorithm_class(self.algorithm))
        return {key: repr(value) for key, value in arguments.items() if key not in RUNNER_KEYS | self.hyperparams.keys()}

    def command(self, python: str = "python") -> list[str]:
        """The command that trains this run alone."""
        name = [self.suite, "--tasks", self.task, "--algos", self.algorithm, "--seeds", str(self.seed)]
        return [python, "-m", str(__package__), "train", *name, "--steps", str(self.n_timesteps)]

    def is_finished(self, out: Path) -> bool:
        """
        Whether ``out`` holds the result of this run.

        :param out: folder of all runs
        :raises ValueError: if it holds a result made with other settings, which must be neither mixed in nor lost
        """
        meta = out / self.folder / "meta.json"
        if not meta.exists():
            return False
        content = json.loads(meta.read_text())
        wanted = json.loads(json.dumps({**asdict(self), "defaults": self.defaults}))
        for key in wanted.keys() - {"suite"}:
            if content[key] != wanted[key]:
                raise ValueError(
                    f"{meta.parent} was made with {key} {content[key]!r}, not {wanted[key]!r}: "
                    "move it away or choose another folder"
                )
        return True


def check_known(what: str, values: Iterable[Any], choices: Iterable[Any]) -> None:
    """
    :param what: what the values are, for the message
    :param values: values to check
    :param choices: valid values
    :raises ValueError: for the first value that is not a choice
    """
    choices = list(choices)
    for value in values:
        if value not in choices:
            raise ValueError(f"unknown {what} {value!r}, valid: {', '.join(map(str, choices))}")


def check_hyperparams(algorithm: str, hyperparams: dict[str, Any]) -> None:
    """
    :param algorithm: name in ``ALGORITHMS``, with or without a label
    :param hyperparams: rl-zoo hyperparameters
    :raises ValueError: for an unknown key, policy, noise or wrapper, a text where a number belongs, or a ``policy_kwargs`` or
        ``score_target`` that cannot be read
    """
    cls = algorithm_class(algorithm)
    defaults = constructor_arguments(cls)
    check_known(f"hyperparameter of {algorithm}", hyperparams, sorted((defaults.keys() - RUNNER_KEYS) | ZOO_KEYS))
    for name, value in hyperparams.items():
        if isinstance(value, str) and isinstance(defaults.get(name), int | float):
            raise ValueError(f"{name} of {algorithm} must be a number, got the text {value!r}; in YAML write !!float 3e-4")
    check_known(f"policy of {algorithm}", [hyperparams.get("policy")], cls.policy_aliases)
    check_known(f"noise_type of {algorithm}", [hyperparams.get("noise_type", "normal")], NOISE)
    read_policy_kwargs(hyperparams)
    for name in ("score_target", "env_wrapper"):
        read_function(name, hyperparams)


def constructor_arguments(cls: type) -> dict[str, Any]:
    """
    :param cls: a class
    :return: defaults of its constructor's arguments, and of those that it hands on to its base class as ``**kwargs``
    """
    arguments = inspect.signature(cls).parameters.values()
    defaults = {it.name: it.default for it in arguments if it.kind is not it.VAR_KEYWORD}
    return defaults if len(defaults) == len(arguments) else constructor_arguments(cls.__mro__[1]) | defaults


def read_policy_kwargs(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    :param hyperparams: rl-zoo hyperparameters; ``policy_kwargs`` is Python text there, in which ``nn`` is torch.nn
    :return: the value of ``policy_kwargs``
    :raises ValueError: if the text cannot be evaluated
    """
    text = str(hyperparams.get("policy_kwargs", {}))
    try:
        return dict(eval(text, {"nn": nn}))
    except Exception as error:
        raise ValueError(f"policy_kwargs {text!r} cannot be read: {error}") from error


def read_function(name: str, hyperparams: dict[str, Any]) -> Any:
    """
    :param name: ``score_target`` or ``env_wrapper``
    :param hyperparams: rl-zoo hyperparameters; a text with a dot names a function, as in ``benchmarks.targets``
    :return: the function, or the value as it is
    :raises ValueError: if nothing has the dotted name
    """
    value = hyperparams.get(name)
    if not isinstance(value, str) or "." not in value:
        return value
    try:
        return resolve_name(value)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} {value!r} names no function: {error}") from error


def register_environments(tasks: Iterable[str]) -> None:
    """
    Gymnasium finds its own environments; dm_control's are registered by a package, others by the module before a colon.

    :param tasks: environment ids
    """
    for task in tasks:
        if task.startswith("dm_control/"):
            import shimmy  # noqa: F401
        if ":" in task:
            importlib.import_module(task.partition(":")[0])


def read_suite(suite: str) -> list[Run]:
    """
    :param suite: name of a file in ``benchmarks/suites`` or path of a YAML file
    :return: all its runs, seed by seed, so that an unfinished matrix can already be compared
    :raises ValueError: for an unknown suite, key, algorithm, task or hyperparameter
    """
    file = Path(suite) if suite.endswith(".yml") else SUITES / f"{suite}.yml"
    if not file.exists():
        names = ", ".join(sorted(path.stem for path in SUITES.glob("*.yml")))
        raise ValueError(f"unknown suite {suite!r}, valid: {names}, or the path of a .yml file")
    content = yaml.safe_load(file.read_text())
    check_known(f"key in {file.name}", content, SUITE_KEYS)
    for key in SUITE_KEYS:
        if key not in content:
            raise ValueError(f"{file.name} lacks {key!r}")
    for key in NUMBER_KEYS:
        value = content[key]
        if not isinstance(value, int | float) or value < 1 or value != int(value):
            raise ValueError(f"{key} in {file.name} must be a whole number of at least 1, got {value!r}")
        content[key] = int(value)  # rl-zoo writes !!float 1e6
    register_environments(content["tasks"])
    check_known("task", [task.rpartition(":")[2] for task in content["tasks"]], gym.registry)
    runs = []
    for algorithm, entries in content["algorithms"].items():
        algorithm_class(algorithm)
        if isinstance(entries, str):
            entries = yaml.safe_load((file.parent / entries).read_text())
        else:
            check_known(f"task under {algorithm}", entries, ["default", *content["tasks"]])
        for task in content["tasks"]:
            hyperparams = entries.get(task, entries.get("default"))
            if hyperparams is None:
                raise ValueError(f"{file.name} has no hyperparameters of {algorithm} for {task!r} and no 'default'")
            check_hyperparams(algorithm, hyperparams)
            steps, eval_freq, episodes = (content[key] for key in NUMBER_KEYS)
            runs += [Run(suite, task, algorithm, seed, steps, eval_freq, episodes, hyperparams) for seed in content["seeds"]]
    order = content["tasks"]
    return sorted(runs, key=lambda run: (run.seed, order.index(run.task)))


def select(runs: list[Run], **chosen: list[Any] | None) -> list[Run]:
    """
    :param runs: runs of a suite
    :param chosen: for ``algorithm``, ``task``, ``seed``: the wanted values, or None for all
    :return: the runs that match
    :raises ValueError: for a value that the suite does not contain
    """
    for field, values in chosen.items():
        if values is not None:
            check_known(f"{field} in this suite", values, dict.fromkeys(getattr(run, field) for run in runs))
            runs = [run for run in runs if getattr(run, field) in values]
    return runs

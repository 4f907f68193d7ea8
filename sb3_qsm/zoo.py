"""
rl-zoo with QSM: ``python -m sb3_qsm.zoo train --env HalfCheetah-v5``, then ``enjoy``, ``plot``, ...

The zoo reads its table of algorithms as it starts, so QSM has to be in it before: that is what this launcher does.
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM, PublishedQSM
from sb3_qsm.schedules import SCHEDULES

if TYPE_CHECKING:
    import optuna

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"qsm": QSM, "published_qsm": PublishedQSM}
ZOO_SCRIPTS = ("train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub")
HYPERPARAMS = Path(__file__).parent / "hyperparams"
POLICY_PARAMS = ("noise_schedule", "n_diffusion_steps")


def sample_qsm_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for QSM hyperparams: those of SAC, and the noise levels.

    :param trial: Optuna's trial
    :param n_actions: number of action dimensions
    :param n_envs: number of parallel environments
    :param additional_args: what the zoo knows of the replay buffer
    :return: arguments of QSM
    """
    from rl_zoo3.hyperparams_opt import sample_sac_params

    hyperparams: dict[str, Any] = sample_sac_params(trial, n_actions, n_envs, additional_args)
    hyperparams["policy_kwargs"]["noise_schedule"] = trial.suggest_categorical("noise_schedule", list(SCHEDULES))
    hyperparams["policy_kwargs"]["n_diffusion_steps"] = trial.suggest_int("n_diffusion_steps", 4, 20)
    return hyperparams


def convert_qsm_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of QSM from a finished trial.

    :param sampled_params: what ``sample_qsm_params`` drew, by name
    :return: arguments of QSM
    """
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    hyperparams: dict[str, Any] = convert_offpolicy_params(sampled_params)
    hyperparams["policy_kwargs"].update({name: hyperparams.pop(name) for name in POLICY_PARAMS})
    return hyperparams


def register() -> None:
    """
    Make QSM known to rl_zoo3, and dm_control's tasks to Gymnasium.
    """
    import rl_zoo3
    import rl_zoo3.hyperparams_opt
    import shimmy  # noqa: F401

    rl_zoo3.ALGOS.update(ALGORITHMS)
    for name in ALGORITHMS:
        rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[name] = sample_qsm_params
        rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[name] = convert_qsm_params


def zoo_arguments(script: str, arguments: list[str]) -> list[str]:
    """
    The command line for the zoo's script: QSM is the default algorithm, ``train`` finds the files shipped here, and
    ``--checkpoints`` becomes the zoo's argument ``callback``.

    :param script: one of ``ZOO_SCRIPTS``
    :param arguments: the user's command line; ``-c qsm`` names a file shipped with this package
    :return: the zoo's command line
    :raises ValueError: for checkpoints of anything but a training
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="qsm")
    parser.add_argument("-c", "-conf", "--conf-file")
    parser.add_argument("--checkpoints")
    parser.add_argument("--checkpoint-freq", type=int, default=10_000)
    parser.add_argument("-params", "--hyperparams", nargs="+", default=[])
    known, rest = parser.parse_known_args(arguments)
    conf_file = known.conf_file or (known.algo if known.algo in ALGORITHMS and script == "train" else None)
    if conf_file is not None:
        shipped = HYPERPARAMS / f"{conf_file}.yml"
        rest += ["--conf-file", str(shipped if shipped.is_file() else conf_file)]
    if known.checkpoints is not None:
        if script != "train" or {"-optimize", "--optimize-hyperparameters"} & set(rest):
            raise ValueError(f"--checkpoints={known.checkpoints!r} goes with training, got {' '.join([script, *arguments])}")
        callback = dict(save_freq=known.checkpoint_freq, save_path=known.checkpoints, verbose=1)
        known.hyperparams.append(f"callback:{ {'sb3_qsm.resume.ResumeCallback': callback} }")
    return ["--algo", known.algo, *rest, *(["--hyperparams", *known.hyperparams] if known.hyperparams else [])]


def plot(arguments: list[str]) -> Path:
    """
    Picture of the evaluations of a run.

    :param arguments: command line: a folder, of which the newest run is taken (default: logs)
    :return: path of the picture, in the folder of the run
    :raises ValueError: for a folder without evaluations
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(prog="python -m sb3_qsm.zoo plot", description="Learning curve of the newest run")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("logs"))
    folder = parser.parse_args(arguments).folder
    runs = sorted(folder.rglob("evaluations.npz"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(f"folder={str(folder)!r} holds no evaluations.npz; choose one that `zoo train` has written")
    evaluations = np.load(runs[-1])
    mean, std = evaluations["results"].mean(axis=1), evaluations["results"].std(axis=1)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.fill_between(evaluations["timesteps"], mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.plot(evaluations["timesteps"], mean, marker=".")
    axes.set(title=runs[-1].parent.name, xlabel="Environment steps", ylabel="Return (mean and std of the episodes)")
    axes.grid(alpha=0.3)
    picture: Path = runs[-1].parent / "learning_curve.png"
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    print(f"Learning curve: {picture}")
    return picture


def main(arguments: list[str]) -> None:
    """
    Run a script of the zoo, or ``plot``.

    :param arguments: command line: the script's name, then its own arguments; ``--checkpoints FOLDER`` with ``train`` saves
        there every ``--checkpoint-freq`` calls to ``env.step()`` (10 000), and the same command again goes on from there
    :raises ValueError: for an unknown script
    """
    script, *rest = arguments or [""]
    if script == "plot":
        plot(rest)
        return
    if script not in ZOO_SCRIPTS:
        raise ValueError(f"script={script!r} is unknown, choose one of {', '.join((*ZOO_SCRIPTS, 'plot'))}")
    sys.argv = [f"rl_zoo3.{script}", *zoo_arguments(script, rest)]
    try:
        register()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('The zoo is not installed: pip install "sb3-qsm[zoo]"') from error
    runpy.run_module(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

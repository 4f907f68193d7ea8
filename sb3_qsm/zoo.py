"""
QSM in rl-zoo: its name, its search space for Optuna, and an experiment that :mod:`sb3_qsm.cli` runs.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import rl_zoo3
import shimmy  # noqa: F401  (registers dm_control's tasks)
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import (
    HYPERPARAMS_CONVERTER,
    HYPERPARAMS_SAMPLER,
    convert_offpolicy_params,
    sample_sac_params,
)
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM, PublishedQSM
from sb3_qsm.resume import ResumeCallback
from sb3_qsm.schedules import SCHEDULES

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"qsm": QSM, "published_qsm": PublishedQSM}
HYPERPARAMS = Path(__file__).parent / "hyperparams"
POLICY_PARAMS = ("noise_schedule", "n_diffusion_steps")


def sample_qsm_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for QSM hyperparams: those of SAC, and the noise levels.

    :param trial: Optuna's trial
    :param n_actions: number of action dimensions
    :param n_envs: number of parallel environments
    :param additional_args: what the zoo knows of the replay buffer
    :return: arguments of QSM
    """
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
    hyperparams: dict[str, Any] = convert_offpolicy_params(sampled_params)
    hyperparams["policy_kwargs"].update({name: hyperparams.pop(name) for name in POLICY_PARAMS})
    return hyperparams


def register() -> None:
    """
    Make QSM known to rl_zoo3, in this process.
    """
    rl_zoo3.ALGOS.update(ALGORITHMS)
    for name in ALGORITHMS:
        HYPERPARAMS_SAMPLER[name] = sample_qsm_params
        HYPERPARAMS_CONVERTER[name] = convert_qsm_params


class ProgressLines(BaseCallback):
    """
    A line at each hundredth of a training, where a progress bar would fill a file with its redrawings.
    """

    share = 0

    def _on_step(self) -> bool:
        total = self.model._total_timesteps
        share = 100 * self.num_timesteps // total
        if share > self.share:
            self.share = share
            speed = (self.num_timesteps - self.model._num_timesteps_at_start) / (time.time_ns() - self.model.start_time) * 1e9
            returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            mean_return = f", return {np.mean(returns):.1f}" if returns else ""
            print(f"{share} %: {self.num_timesteps} of {total} steps, {speed:.0f} steps/s{mean_return}")
        return True


class Experiment(ExperimentManager):
    """
    The zoo's, with exact checkpoints, twenty evaluations by default, and dictionaries of dm_control made vectors.

    :param args: command line: the zoo's, ``checkpoint_freq``, and ``run``, the folder of a run to go on with or None
    """

    def __init__(self, args: argparse.Namespace, *zoo_args: Any, **zoo_kwargs: Any) -> None:
        super().__init__(args, *zoo_args, **zoo_kwargs)
        if args.run is not None:
            self.save_path = args.run
            self.params_path = f"{args.run}/{self.env_name}"

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: hyperparameters to use, and the same to save
        """
        both = super().read_hyperparameters()
        if self.env_name.gym_id.startswith("dm_control/") and both[0].get("policy") == "MlpPolicy":
            for hyperparams in both:
                hyperparams.setdefault("env_wrapper", "gymnasium.wrappers.FlattenObservation")
        return both

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        An attempt that fails leaves no folder, which would be taken for the newest run.

        :return: model and its hyperparameters, None for a search
        """
        try:
            return super().setup_experiment()
        except Exception:
            if self.args.run is None:
                shutil.rmtree(self.save_path, ignore_errors=True)
            raise

    def create_callbacks(self) -> None:
        """
        The zoo's callbacks behind that of the checkpoints, which has to be the first.
        """
        if self.args.run is not None:  # the episodes so far stay in monitor.csv
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
        if self.eval_freq == 0:
            self.eval_freq = max(self.n_timesteps // 20, 1)
        if self.show_progress and not sys.stdout.isatty():
            self.show_progress = False
            self.callbacks.append(ProgressLines())
        super().create_callbacks()  # type: ignore[no-untyped-call]
        if self.args.checkpoint_freq > 0 and not self.optimize_hyperparameters:
            save_freq = max(self.args.checkpoint_freq // self.n_envs, 1)
            self.callbacks.insert(0, ResumeCallback(save_freq, Path(self.save_path, "checkpoints"), verbose=1))

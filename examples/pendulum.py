"""
Train, save, load, evaluate: about two minutes on a laptop.

    pip install -e ".[zoo]"  # for matplotlib and the progress bar
    python examples/pendulum.py
"""

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM


def main(steps=5000, path="pendulum.png"):
    evaluation_env = Monitor(gym.make("Pendulum-v1"))
    callback = EvalCallback(evaluation_env, eval_freq=max(steps // 8, 1), log_path="logs/pendulum", verbose=0)
    model = QSM("MlpPolicy", "Pendulum-v1", seed=0)
    model.learn(steps, callback=callback, progress_bar=True)

    model.save("pendulum_qsm")
    model = QSM.load("pendulum_qsm")
    mean, std = evaluate_policy(model, evaluation_env, n_eval_episodes=10)
    print(f"return of the loaded policy: {mean:.0f} +- {std:.0f}")

    evaluations = np.load("logs/pendulum/evaluations.npz")
    figure, panel = plt.subplots(figsize=(5, 3.5), layout="constrained")
    panel.plot(evaluations["timesteps"], evaluations["results"], ".", color="tab:gray")
    panel.plot(evaluations["timesteps"], evaluations["results"].mean(axis=1), color="tab:blue", label="mean of 5 episodes")
    panel.set(title="QSM on Pendulum-v1", xlabel="environment steps", ylabel="return of an episode")
    panel.legend()
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()

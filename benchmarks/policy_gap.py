"""
How far a policy is from the best action of its own critics: ``python -m benchmarks.policy_gap FOLDER`` of a finished cell.

At states that the policy visits, the best action is looked for by gradient ascent from its own and from random actions. The
gap is in units of the temperature: a policy exp(Q / lambda) around a smooth maximum inside the box has A / 2.
"""

import argparse
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from benchmarks.algorithms import algorithm_class
from benchmarks.cells import make_env
from benchmarks.pictures import mean_q
from benchmarks.suites import Cell, register_environments

N_STATES, N_ACTIONS, N_EPISODES, N_STEPS = 48, 64, 4, 100


def visited(model: OffPolicyAlgorithm, env: gym.Env) -> np.ndarray:
    """
    :param model: a model
    :param env: its environment
    :return: states of ``N_EPISODES`` episodes with sampled actions, shape (N_STATES, observation size)
    """
    states = []
    for episode in range(N_EPISODES):
        obs, _ = env.reset(seed=100 + episode)
        over = False
        while not over:
            states.append(obs)
            obs, _, terminated, truncated, _ = env.step(model.predict(obs)[0])
            over = terminated or truncated
    return np.array(states)[np.random.default_rng(0).choice(len(states), N_STATES, replace=False)]


def gap(model: OffPolicyAlgorithm, states: np.ndarray) -> dict[str, float]:
    """
    :param model: QSM, or SAC with a learnt temperature
    :param states: shape (S, observation size)
    :return: mean of best Q minus Q, over lambda, for sampled and deterministic actions and for the ends of ascents that began
        at sampled actions; standard deviation of the sampled actions
    """
    rows = np.repeat(states, N_ACTIONS, axis=0)
    obs = th.as_tensor(rows, dtype=th.float32)
    learnt = model.temperature.log_ent_coef if hasattr(model, "temperature") else model.log_ent_coef  # type: ignore[attr-defined]
    ent_coef = learnt.detach().exp()

    def q_values(actions: th.Tensor) -> th.Tensor:
        return mean_q(model, obs, actions).view(-1, N_ACTIONS)

    def ascend(actions: th.Tensor) -> th.Tensor:
        actions = actions.clone().requires_grad_(True)
        optimizer = th.optim.Adam([actions], lr=0.05)
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            (-q_values(actions).sum()).backward()
            optimizer.step()
            actions.data.clamp_(-1, 1)
        return q_values(actions).detach()

    def draw(deterministic: bool) -> th.Tensor:
        actions, _ = model.predict(rows, deterministic=deterministic)
        return th.as_tensor(model.policy.scale_action(actions), dtype=th.float32)

    sampled = draw(deterministic=False)
    ascended = ascend(sampled)
    best = th.maximum(ascended.amax(dim=1), ascend(2 * th.rand_like(sampled) - 1).amax(dim=1))[:, None]
    values = {"sampled": q_values(sampled), "deterministic": q_values(draw(deterministic=True)), "ascended": ascended}
    gaps = {name: ((best - value.detach()) / ent_coef).mean().item() for name, value in values.items()}
    return gaps | {"spread": sampled.view(-1, N_ACTIONS, sampled.shape[1]).std(dim=1).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a cell of QSM or SAC, with its model.zip")
    folder = parser.parse_args().folder
    th.set_num_threads(1)
    th.manual_seed(0)
    cell = Cell(**json.loads((folder / "meta.json").read_text())["cell"])
    register_environments([cell.task])
    model = algorithm_class(cell.algorithm).load(folder / "model", device="cpu")
    cells = [f"{name} {value:.2f}" for name, value in gap(model, visited(model, make_env(cell))).items()]
    print(f"{cell.task} {cell.algorithm}: {', '.join(cells)}")


if __name__ == "__main__":
    main()

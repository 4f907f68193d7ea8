"""
One update of the authors' JAX learner, recorded with all its random draws, reproduced by :class:`PublishedQSM`.

``data/authors_update.npz``: repository score_matching_rl, commit 2e77893, run once with flax 0.12.8 and jax 0.10.2 on a CPU in
float32; see ``data/README.md`` for its keys. The only stand-in here is the random number generator, which replays the record.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_qsm import PublishedQSM

RECORD = np.load(Path(__file__).parent / "data" / "authors_update.npz")


class SpacesOnly(gym.Env):
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)


def tensor(key: str) -> th.Tensor:
    return th.as_tensor(RECORD[key])


def authors_weights(when: str, target_prefix: str) -> dict[str, th.Tensor]:
    """
    :param when: "before" or "after" the update
    :param target_prefix: what the record calls the target critics; before the update they equal the critics
    :return: the record's parameters under our names; kernels of flax are (in, out)
    """
    names = {}
    for ours in ("actor.denoiser", "actor.average.denoiser"):
        names[f"{ours}.time_net.1"] = "score_model/MLP_0/Dense_0"
        names[f"{ours}.time_net.3"] = "score_model/MLP_0/Dense_1"
        names[f"{ours}.layers.0"] = "score_model/MLP_1/Dense_0"
        names[f"{ours}.layers.2"] = "score_model/MLP_1/Dense_1"
        names[f"{ours}.layers.4"] = "score_model/MLP_1/Dense_2"
    for ours, prefix in [("critic", ""), ("critic_target", target_prefix)]:
        for i in (0, 1):
            names[f"{ours}.qf{i}.0"] = f"{prefix}critic_{i + 1}/MLP_0/Dense_0"
            names[f"{ours}.qf{i}.2"] = f"{prefix}critic_{i + 1}/MLP_0/Dense_1"
            names[f"{ours}.qf{i}.4"] = f"{prefix}critic_{i + 1}/Dense_0"
    frequencies = tensor(f"{when}/score_model/FourierFeatures_0/kernel")[:, 0]
    weights = {f"{ours}.denoiser.time_net.0.frequencies": frequencies for ours in ("actor", "actor.average")}
    for ours, theirs in names.items():
        weights[f"{ours}.weight"] = tensor(f"{when}/{theirs}/kernel").T
        weights[f"{ours}.bias"] = tensor(f"{when}/{theirs}/bias")
    return weights


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PublishedQSM:
    """The published configuration in the record's sizes, with the record's batch, weights and random numbers."""
    model = PublishedQSM("MlpPolicy", SpacesOnly(), policy_kwargs=dict(net_arch=[16, 16]), buffer_size=100, device="cpu")
    model.set_logger(configure(None, []))
    weights = authors_weights("before", "") | {"actor.n_averaged": th.zeros(())}
    assert model.policy.state_dict().keys() == weights.keys()
    model.policy.load_state_dict(weights)
    batch = {key: tensor(f"batch/{key}") for key in ("observations", "actions", "next_observations")}
    batch["dones"], batch["rewards"] = 1 - tensor("batch/masks")[:, None], tensor("batch/rewards")[:, None]
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: ReplayBufferSamples(**batch))
    # Our chain reads its noise by level, the record holds it in the order of drawing, t = T - 1 first
    chain = th.cat([tensor("noise/x_T")[None], tensor("noise/chain").flip(0)])
    normals = iter([tensor("noise/target_action"), tensor("noise/forward")])
    sample = model.actor.sample
    monkeypatch.setattr(model.actor, "sample", lambda obs, noise: sample(obs, chain))
    monkeypatch.setattr(th, "randn_like", lambda *args, **kwargs: next(normals))
    monkeypatch.setattr(th, "randint", lambda *args, **kwargs: tensor("noise/time").long())
    return model


def test_schedule(model: PublishedQSM) -> None:
    np.testing.assert_allclose(1 / (1 + model.actor.ratios**2), RECORD["alpha_hats"], rtol=1e-5)


def test_one_update(model: PublishedQSM, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []

    def mse_loss(q_value: th.Tensor, target: th.Tensor) -> th.Tensor:
        targets.append(target)
        return ((q_value - target) ** 2).mean()

    monkeypatch.setattr(th.nn.functional, "mse_loss", mse_loss)
    model.train(gradient_steps=1)

    for name in ("mean", "min", "max"):
        np.testing.assert_allclose(getattr(targets[0], name)(), RECORD[f"info/target_q_{name}"], rtol=1e-5)
    logged = model.logger.name_to_value
    np.testing.assert_allclose(
        logged["train/critic_loss"], RECORD["info/c_loss_mean_1"] + RECORD["info/c_loss_mean_2"], rtol=1e-5
    )
    np.testing.assert_allclose(logged["train/actor_loss"], RECORD["info/actor_loss_mean"], rtol=1e-5)
    for name, expected in authors_weights("after", "target_").items():
        np.testing.assert_allclose(model.policy.state_dict()[name], expected, atol=1e-5, rtol=1e-5, err_msg=name)

"""Bad arguments and bad numbers: a clear error at once, and nothing trained on garbage."""

import copy
import inspect
import math
import operator
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.sac import policies

from sb3_qsm import QSM

SMALL = dict(learning_starts=10, batch_size=8, buffer_size=100, seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))

# Malformed values of each argument of QSM's own, and what the error says is allowed
BAD_ARGUMENTS = {
    "policy_delay": ([0, 1.5, "2", True], "integral and within [1, inf]"),
    "n_steps": ([0, -3, 2.5, True], "integral and within [1, inf]"),
    "pessimism": ([-0.1, 1.5, math.nan, None], "real and within [0, 1]"),
    "ema_decay": ([-0.1, 1.5, math.nan, None], "real and within [0, 1]"),
    "normalize_reward": ([1, "auto", None], "True or False"),
    "keep_modes": ([1, "auto", None], "True or False"),
    "ent_coef": (["aut", "auto_0", 0, -1.0, math.nan, None], 'a positive number, "auto" or "auto_<positive number>"'),
    "target_entropy": (["aut", math.nan, math.inf, None], 'a number or "auto"'),
    "score_target": (["papr", None, 1], "one of ['box', 'heights', 'published']"),
}
BAD_DIFFUSIONS = {
    "n_diffusion_steps": ([0, -1, 2.0, "5", None, True], "an integer of at least 1"),
    "noise_schedule": (["vpp", 3, None], "one of ['cosine', 'geometric', 'vp']"),
    "sampler": (["ddqm", None], "one of ['ddim', 'ddpm']"),
    "preconditioning": (["karras", None], "one of ['edm', 'noise']"),
    "denoiser_class": (["unet", None], "one of ['late_fusion', 'mlp']"),
    "learn_variance": ([1, "yes", None], "True or False"),
    "n_critics": ([0, 1.5], "an integer of at least 1"),
}


def cases(table):
    return [(name, value, allowed) for name, (values, allowed) in table.items() for value in values]


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("name, value, allowed", cases(BAD_ARGUMENTS))
def test_bad_values(name, value, allowed):
    with expect(ValueError, f"{name} must be {allowed}, got {value!r}"):
        QSM("MlpPolicy", "Pendulum-v1", **{name: value})


@pytest.mark.parametrize("name, value, allowed", cases(BAD_DIFFUSIONS))
def test_bad_diffusions(name, value, allowed):
    with expect(ValueError, f"{name} must be {allowed}, got {value!r}"):
        QSM("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})


def test_arguments_are_sacs_in_sacs_order_and_five():
    """Each of ours has a bad value above; SB3's own are SB3's to check."""
    ours, theirs = (list(inspect.signature(algorithm.__init__).parameters) for algorithm in (QSM, SAC))
    own = ["policy_delay", "pessimism", "ema_decay", "normalize_reward", "score_target", "keep_modes"]
    assert [name for name in ours if name not in own] == [name for name in theirs if "sde" not in name]
    assert [name for name in ours if name in own] == own and set(own) < set(BAD_ARGUMENTS)


@pytest.mark.parametrize(
    "kwargs, error, message",
    # Checked by Stable-Baselines3, by torch, or by python's own call
    [
        (dict(policy="Mlp"), ValueError, "Policy Mlp unknown"),
        (dict(env="Nope-v0"), gym.error.NameNotFound, "Environment `Nope` doesn't exist"),
        (dict(train_freq=1.5), ValueError, "The frequency of `train_freq` must be an integer and not 1.5"),
        (dict(policy_kwargs=dict(nope=1)), TypeError, "unexpected keyword argument 'nope'"),
        (dict(policy_kwargs=dict(denoiser_kwargs=dict(nope=1))), TypeError, "unexpected keyword argument 'nope'"),
        (dict(policy_kwargs=dict(net_arch=dict(pi=[8]))), AssertionError, "no key 'qf' was provided in net_arch"),
        (dict(replay_buffer_kwargs=dict(nope=1)), TypeError, "unexpected keyword argument 'nope'"),
    ],
)
def test_bad_arguments_of_others(kwargs, error, message):
    with expect(error, message):
        QSM(**dict(policy="MlpPolicy", env="Pendulum-v1", buffer_size=100) | kwargs)


def test_numbers_that_sac_takes():
    """Such as a YAML file has."""
    QSM("MlpPolicy", "Pendulum-v1", **SMALL | dict(learning_starts=1e1, policy_delay=np.int64(2))).learn(1.2e1)


def test_policy_or_file_of_another_algorithm(tmp_path):
    message = (
        "policy must be one of ['CnnPolicy', 'MlpPolicy', 'MultiInputPolicy'] or a subclass of DiffusionPolicy, got SACPolicy"
    )
    with expect(ValueError, message):
        QSM(policies.MlpPolicy, "Pendulum-v1")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=100, device="cpu").save(tmp_path / "sac")
    with expect(ValueError, message):
        QSM.load(tmp_path / "sac", device="cpu")


class Broken(gym.Env):
    """Turns one number into garbage at a step of one's choice; episodes take five steps."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, what=None, when=math.inf, value=math.nan):
        self.what, self.when, self.value = what, when, value
        self.n_steps = 0

    def observation(self):
        observation = self.observation_space.sample()
        if self.what == "observation" and self.n_steps >= self.when:
            observation[-1] = self.value
        return observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation(), {}

    def step(self, action):
        self.n_steps += 1
        reward = self.value if self.what == "reward" and self.n_steps >= self.when else 0.0
        return self.observation(), reward, False, self.n_steps % 5 == 0, {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("when", [3, 20])
def test_broken_environment_stops_training_before_a_weight_is_spoilt(what, when, value):
    model = QSM("MlpPolicy", Broken(what, when, value), **SMALL)
    with pytest.raises(ValueError, match=r"(critic|representation)_loss must be finite, got (nan|inf): see VecCheckNan"):
        model.learn(60)
    assert all(weight.isfinite().all() for weight in model.policy.state_dict().values())
    assert model.temperature.value().isfinite() and model.reward_scale.value().isfinite()


def trained(**kwargs):
    return QSM("MlpPolicy", "Pendulum-v1", **SMALL | kwargs).learn(15)


@pytest.mark.parametrize("part", ["actor.denoiser", "actor.slow_representation", "critic", "critic_target"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weight_stops_training(part, value):
    """Nothing changes but what was broken."""
    model = trained()
    next(operator.attrgetter(part)(model).parameters()).data.fill_(value)
    before = {name: weight.clone() for name, weight in model.policy.state_dict().items()}
    temperature = model.temperature.value()
    with pytest.raises(ValueError, match=r"critic_loss must be finite, got (nan|inf)"):
        model.train(gradient_steps=5, batch_size=8)
    for name, weight in model.policy.state_dict().items():
        assert th.equal(weight.nan_to_num(), before[name].nan_to_num()), name
    assert th.equal(model.temperature.value(), temperature)


def test_broken_representation_stops_training():
    model = trained()
    next(model.representation.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="representation_loss must be finite, got nan"):
        model.train(gradient_steps=5, batch_size=8)
    acting = [model.critic, model.critic_target, model.actor.denoiser, model.actor.slow_representation]
    assert all(weight.isfinite().all() for network in acting for weight in network.parameters())


def test_training_goes_on_when_the_weights_are_mended():
    model = trained()
    good = copy.deepcopy(model.get_parameters())
    next(model.critic.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="critic_loss must be finite"):
        model.train(gradient_steps=1, batch_size=8)
    model.set_parameters(good)
    model.train(gradient_steps=1, batch_size=8)


def test_overflowing_target_stops_training():
    """At a temperature of next to nothing the published target overflows: the actor never sees it."""
    model = QSM("MlpPolicy", "Pendulum-v1", ent_coef=1e-44, score_target="published", **SMALL)
    before = [parameter.clone() for parameter in model.actor.parameters()]
    with pytest.raises(ValueError, match=r"actor_loss must be finite, got (nan|inf)"):
        model.learn(20)
    assert all(th.equal(old, new) for old, new in zip(before, model.actor.parameters(), strict=True))

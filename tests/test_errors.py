"""Bad arguments and bad numbers: a clear error at once, nothing trained on garbage, nothing saved over a good file."""

import copy
import inspect
import math
import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm import QSM

SMALL = dict(learning_starts=10, batch_size=8, buffer_size=100, seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))

# Malformed values of each argument that QSM checks, and what the error says is allowed
BAD_NUMBERS = {
    "learning_rate": ([-1.0, math.nan, math.inf, "abc", None], f"real and within [0, {sys.float_info.max}]"),
    "buffer_size": ([0, 1e5, None, True], "integral and within [1, inf]"),
    "learning_starts": ([-1, 0.5, math.nan], "integral and within [0, inf]"),
    "batch_size": ([0, 2.5, "256"], "integral and within [1, inf]"),
    "tau": ([-0.1, 1.5, math.nan, None], "real and within [0, 1]"),
    "gamma": ([-0.1, 1.5, math.nan, "0.99"], "real and within [0, 1]"),
    "gradient_steps": ([-2, 0.5, None], "integral and within [-1, inf]"),
    "n_steps": ([0, 1.0], "integral and within [1, inf]"),
    "policy_delay": ([0, 1.5], "integral and within [1, inf]"),
    "actor_tau": ([-0.1, 1.5, math.nan, None], "real and within [0, 1]"),
    "target_update_interval": ([0, 1.5], "integral and within [1, inf]"),
    "target_policy_noise": ([-0.1, math.nan, math.inf, None], f"real and within [0, {sys.float_info.max}]"),
    "pessimism": ([-0.1, 1.5, math.nan, None], "real and within [0, 1]"),
    "actor_lr_decay_updates": ([0, -5, math.nan, None], "real and within [1, inf]"),
    "stats_window_size": ([0, 1.5], "integral and within [1, inf]"),
    "seed": ([-1, 1.5, "a", 2**32], "integral and within [0, 4294967295]"),
}
BAD_TYPES = {
    "action_noise": ([0.1, "normal"], "ActionNoise"),
    "replay_buffer_kwargs": ([[1], "n_steps=3"], "dict"),
    "optimize_memory_usage": (["yes", 1], "bool"),
    "policy_kwargs": (["net_arch=[8]", [8]], "dict"),
}
BAD_CHOICES = {
    "value_scale": (["aut", 0, -1.0, math.nan, math.inf, None, True, "2"], 'a positive number or "auto"'),
    "ent_coef": (["aut", "auto_0", 0, -1.0, math.nan, None], 'a positive number, "auto" or "auto_<positive number>"'),
    "target_entropy": (["aut", math.nan, math.inf, None], 'a number or "auto"'),
    "replay_buffer_class": (["her", 3, dict], "a subclass of ReplayBuffer"),
    "score_target": (["papr", None, 1], "one of ['box', 'published']"),
}
BAD_DIFFUSIONS = {
    "n_diffusion_steps": ([0, -1, 2.0, "5", None, True], "an integer of at least 1"),
    "beta_schedule": (["vpp", 3, None], "one of ['box', 'cosine', 'linear', 'vp']"),
    "sampler": (["ddqm", None], "one of ['ddim', 'ddpm', 'running_clip']"),
    "preconditioning": (["karras", None], "one of ['edm', 'noise']"),
    "denoiser_class": (["unet", None], "one of ['late_fusion', 'mlp']"),
}


def cases(table):
    return [(name, value, allowed) for name, (values, allowed) in table.items() for value in values]


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("name, value, allowed", cases(BAD_NUMBERS | BAD_CHOICES))
def test_bad_values(name, value, allowed):
    with expect(ValueError, f"{name} must be {allowed}, got {value!r}"):
        QSM("MlpPolicy", "Pendulum-v1", **{name: value})


@pytest.mark.parametrize("name, value, allowed", cases(BAD_TYPES))
def test_bad_types(name, value, allowed):
    with expect(ValueError, f"{name} must be of type {allowed}, got {value!r}"):
        QSM("MlpPolicy", "Pendulum-v1", **{name: value})


@pytest.mark.parametrize("name, value, allowed", cases(BAD_DIFFUSIONS))
def test_bad_diffusions(name, value, allowed):
    with expect(ValueError, f"{name} must be {allowed}, got {value!r}"):
        QSM("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})


@pytest.mark.parametrize(
    "kwargs, error, message",
    # Checked by Stable-Baselines3, by torch, or by python's own call
    [
        (dict(policy="Mlp"), ValueError, "Policy Mlp unknown"),
        (dict(env="Nope-v0"), gym.error.NameNotFound, "Environment `Nope` doesn't exist"),
        (dict(env=5), ValueError, "The environment is of type <class 'int'>, not a Gymnasium environment"),
        (dict(train_freq=1.5), ValueError, "The frequency of `train_freq` must be an integer and not 1.5"),
        (
            dict(train_freq=(1, "week")),
            ValueError,
            "must be either 'step' or 'episode' not 'week'",
        ),
        (dict(optimize_memory_usage=True), ValueError, "does not support optimize_memory_usage = True and handle_timeout"),
        (dict(device="gpu"), RuntimeError, "Expected one of cpu, cuda"),
        (dict(policy_kwargs=dict(nope=1)), TypeError, "unexpected keyword argument 'nope'"),
        (dict(policy_kwargs=dict(denoiser_kwargs=dict(nope=1))), TypeError, "unexpected keyword argument 'nope'"),
        (dict(policy_kwargs=dict(net_arch=dict(pi=[8]))), AssertionError, "no key 'qf' was provided in net_arch"),
        (dict(replay_buffer_kwargs=dict(nope=1)), TypeError, "unexpected keyword argument 'nope'"),
    ],
)
def test_bad_arguments_of_others(kwargs, error, message):
    with expect(error, message):
        QSM(**dict(policy="MlpPolicy", env="Pendulum-v1", buffer_size=100) | kwargs)


@pytest.mark.parametrize("train_freq", [0, -1, (0, "step")])
def test_train_freq_below_one(train_freq):
    with expect(ValueError, "train_freq must be at least 1, got TrainFreq(frequency="):
        QSM("MlpPolicy", "Pendulum-v1", train_freq=train_freq)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (2,), np.uint8),
        spaces.Box(-1, 1, (2,), np.int32),
        spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 0.0]), dtype=np.float64),
    ],
)
def test_action_boxes(space):
    env = Broken()
    env.action_space = space
    with expect(ValueError, f"action_space must be a Box of floats with low < high in each dimension, got {space}"):
        QSM("MlpPolicy", env)


def test_no_environment():
    with expect(ValueError, "env must be an environment or the id of one, got None"):
        QSM("MlpPolicy", None)


def test_schedule_of_another_length():
    with expect(ValueError, "beta_schedule must return n_diffusion_steps=6 betas, got 7"):
        QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(beta_schedule=lambda n_steps: th.full((n_steps + 1,), 0.1)))


def test_no_critics():
    with expect(ValueError, "n_critics must be at least 1, got 0"):
        QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(n_critics=0))


def test_every_argument_has_a_bad_value():
    """A new argument needs a check, or a place in the list of those that take anything."""
    elsewhere = {"self", "policy", "env", "train_freq", "device"}
    anything = {"tensorboard_log", "verbose", "_init_setup_model"}  # SB3 takes any path and any verbosity
    tested = set(BAD_NUMBERS | BAD_TYPES | BAD_CHOICES)
    assert set(inspect.signature(QSM.__init__).parameters) == tested | elsewhere | anything


def test_dict_observations_need_multi_input_policy():
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,)))
    with expect(ValueError, "You must use `MultiInputPolicy` when working with dict observation space, not MlpPolicy"):
        QSM("MlpPolicy", Broken(observation_space=space), **SMALL)


class Broken(gym.Env):
    """Turns one number into garbage, at a reset or a step of one's choice; episodes take five steps."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, what=None, when=math.inf, value=math.nan, observation_space=None):
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float32)
        self.what, self.when, self.value = what, when, value
        self.n_steps = self.n_resets = 0

    def observation(self, broken):
        value = self.observation_space.sample()
        if broken:
            (value["a"] if isinstance(value, dict) else value)[-1] = self.value
        return value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.n_resets += 1
        return self.observation(self.what == "reset" and self.n_resets == self.when), {}

    def step(self, action):
        self.n_steps += 1
        now = self.n_steps == self.when
        reward = self.value if self.what == "reward" and now else 0.0
        done = self.n_steps % 5 == 0
        return self.observation(self.what == "step" and now), reward, done and self.what == "terminal", done, {}


def assert_stops_clean(model, message):
    """The run stops with ``message``; neither the buffer nor any weight holds garbage."""
    with pytest.raises(ValueError, match=message):
        model.learn(60)
    buffer = model.replay_buffer
    stored = [buffer.observations, buffer.next_observations, buffer.rewards, buffer.actions]
    for arrays in stored:
        for array in arrays.values() if isinstance(arrays, dict) else [arrays]:
            assert np.isfinite(array[: buffer.pos]).all()
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    assert model.temperature.value().isfinite()


@pytest.mark.parametrize(
    "what, when, steps",
    [
        ("reset", 1, 1),  # the first observation of all
        ("reset", 4, 15),  # the first of a later episode
        ("step", 3, 3),  # while exploring
        ("step", 23, 23),  # while learning
        ("step", 25, 25),  # the last of an episode, which a vectorised environment puts aside
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_observation(what, when, steps, value):
    model = QSM("MlpPolicy", Broken(what, when, value), **SMALL)
    assert_stops_clean(model, f"observation must be finite, got .*{value}.* after {steps} steps")


def test_bad_observation_before_any_exploration():
    model = QSM("MlpPolicy", Broken("reset", 1), **SMALL | dict(learning_starts=0))
    assert_stops_clean(model, "observation must be finite, got .*nan.* after 1 steps")


@pytest.mark.parametrize("when", [3, 25])
def test_bad_observation_in_a_dict(when):
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(-1, 1, (1,)))
    model = QSM("MultiInputPolicy", Broken("step", when, observation_space=space), **SMALL)
    assert_stops_clean(model, f"observation must be finite, got .*nan.* after {when} steps")


def test_bad_observation_in_one_of_several_environments():
    env = DummyVecEnv([lambda: Broken(), lambda: Broken("step", 8)])
    assert_stops_clean(QSM("MlpPolicy", env, **SMALL), r"(?s)observation must be finite, got .*nan.* after 16 steps")


def test_bad_observation_behind_vec_normalize():
    env = VecNormalize(DummyVecEnv([lambda: Broken("step", 23)]))
    assert_stops_clean(QSM("MlpPolicy", env, **SMALL), "observation must be finite, got .*nan.* after 23 steps")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [3, 23])
def test_bad_reward(when, value):
    model = QSM("MlpPolicy", Broken("reward", when, value), **SMALL)
    assert_stops_clean(model, rf"reward must be finite, got .*{value}.* after {when} steps")


def test_bad_action_noise():
    noise = NormalActionNoise(np.full(1, math.nan), np.ones(1))
    model = QSM("MlpPolicy", Broken(), action_noise=noise, **SMALL)
    assert_stops_clean(model, "action must be finite, got .*nan.* after 1 steps")


def trained(**kwargs):
    return QSM("MlpPolicy", "Pendulum-v1", **SMALL | kwargs).learn(15)


@pytest.mark.parametrize("part", ["online_actor", "critic", "critic_target"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weight_stops_training(part, value):
    """Nothing changes but what was broken."""
    model = trained()
    next(getattr(model, part).parameters()).data.fill_(value)
    before = {name: weight.clone() for name, weight in model.policy.state_dict().items()}
    temperature = model.temperature.value()
    with pytest.raises(ValueError, match=r"critic_loss must be finite, got (nan|inf) after 15 steps$"):
        model.train(gradient_steps=5, batch_size=8)
    for name, weight in model.policy.state_dict().items():
        assert th.equal(weight.nan_to_num(), before[name].nan_to_num()), name
    assert th.equal(model.temperature.value(), temperature)


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
    before = [parameter.clone() for parameter in model.online_actor.parameters()]
    with pytest.raises(ValueError, match=r"(actor_loss|entropy) must be finite, got (nan|inf) after 11 steps"):
        model.learn(20)
    assert all(th.equal(old, new) for old, new in zip(before, model.online_actor.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["actor", "critic", "critic_target", "temperature"])
def test_broken_model_is_not_saved(part, value, tmp_path):
    model = trained()
    model.save(tmp_path / "model.zip")
    good = (tmp_path / "model.zip").read_bytes()
    list(getattr(model, part).parameters())[-1].data.fill_(value)
    with pytest.raises(ValueError, match=r"(?s)must be finite, got .*(nan|inf)"):
        model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_bytes() == good
    with pytest.raises(ValueError, match="must be finite"):
        model.save(tmp_path / "new.zip")
    assert not (tmp_path / "new.zip").exists()

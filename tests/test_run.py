"""QSM does everything that SB3's off-policy algorithms do; a few steps each."""

import copy
import math
import pickle
import shutil
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her import HerReplayBuffer
from torch import nn

from sb3_qsm import QSM, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.buffers import NStepDictReplayBuffer
from sb3_qsm.losses import SCORE_TARGETS, box_entropy, truncated_normal_mean
from sb3_qsm.networks import DENOISERS, PRECONDITIONINGS, Denoiser, noise_preconditioning
from sb3_qsm.policies import LayerNorm
from sb3_qsm.samplers import SAMPLERS, ddim_sample
from sb3_qsm.schedules import BETA_SCHEDULES, vp_betas

SMALL = dict(learning_starts=20, batch_size=8, buffer_size=500, seed=0, device="cpu")


def build(policy="MlpPolicy", env="Pendulum-v1", **kwargs):
    kwargs["policy_kwargs"] = dict(net_arch=[16]) | kwargs.get("policy_kwargs", {})
    return QSM(policy, env, **SMALL | kwargs)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def run(*args, total_timesteps=30, **kwargs):
    """Train a small model: actor and critics move, and every weight stays finite."""
    model = build(*args, **kwargs)
    modules = [model.online_actor.denoiser, model.actor.denoiser, model.critic, model.critic_target]
    before = [vector(module) for module in modules]
    model.learn(total_timesteps)
    assert all(not th.equal(old, vector(module)) for old, module in zip(before, modules, strict=True))
    assert vector(model.policy).isfinite().all()
    return model


def test_aliases():
    assert QSM.policy_aliases == {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy, "MultiInputPolicy": MultiInputPolicy}
    assert type(build(MlpPolicy).policy) is MlpPolicy


def test_total_timesteps_as_float():
    assert run(total_timesteps=1e3, train_freq=50).num_timesteps == 1000


def test_cnn_policy():
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    run("CnnPolicy", env, total_timesteps=25, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=16)))


def test_multi_input_policy():
    env = SimpleMultiObsEnv(random_start=True, discrete_actions=False, channel_last=False)
    extractor = dict(features_extractor_kwargs=dict(cnn_output_dim=16))
    run("MultiInputPolicy", env, total_timesteps=25, policy_kwargs=extractor)


def test_her():
    env = BitFlippingEnv(n_bits=3, continuous=True)
    kwargs = dict(n_sampled_goal=2, goal_selection_strategy="future")
    run("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs)


@pytest.mark.parametrize(
    "train_freq, gradient_steps, n_updates",
    # Two environments, 40 steps, of which 20 before learning starts
    [(1, 1, 10), (1, -1, 20), (2, 1, 5), ((2, "step"), -1, 20), (1, 0, 0)],
)
def test_vec_env(train_freq, gradient_steps, n_updates):
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model = build(env=env, train_freq=train_freq, gradient_steps=gradient_steps).learn(40)
    assert model._n_updates == n_updates


def test_train_freq_in_episodes():
    env = gym.make("Pendulum-v1", max_episode_steps=15)
    assert run(env=env, total_timesteps=45, train_freq=(1, "episode"), gradient_steps=-1)._n_updates == 30


@pytest.mark.parametrize(
    "buffer_class, kwargs",
    [
        (NStepReplayBuffer, dict()),
        (NStepReplayBuffer, dict(n_steps=3)),
        (NStepDictReplayBuffer, dict(policy="MultiInputPolicy", env=SimpleMultiObsEnv(discrete_actions=False))),
    ],
)
def test_three_step_returns(buffer_class, kwargs, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 would take the buffer's class for the user's
        model = run(**kwargs)
        model.save(tmp_path / "model")
        loaded = QSM.load(tmp_path / "model", env=model.env, gamma=0.5)
    assert type(model.replay_buffer) is type(loaded.replay_buffer) is buffer_class
    assert model.replay_buffer.n_steps == loaded.replay_buffer.n_steps == 3
    assert (model.replay_buffer.gamma, loaded.replay_buffer.gamma) == (0.99, 0.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_steps=1),
        dict(replay_buffer_class=ReplayBuffer),
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        dict(n_steps=1, policy="MultiInputPolicy", env=SimpleMultiObsEnv(discrete_actions=False)),
    ],
)
def test_one_step_returns(kwargs):
    model = build(**kwargs)
    assert not isinstance(model.replay_buffer, NStepReplayBuffer)


@pytest.mark.parametrize(
    "kwargs, n_steps, gamma",
    [
        (dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=5, gamma=0.9)), 5, 0.9),
        (dict(replay_buffer_kwargs=dict(n_steps=5, gamma=0.9)), 5, 0.9),
        (dict(n_steps=5, gamma=0.9, replay_buffer_kwargs=dict(handle_timeout_termination=True)), 5, 0.9),
        (
            dict(
                policy="MultiInputPolicy",
                env=SimpleMultiObsEnv(discrete_actions=False),
                replay_buffer_kwargs=dict(n_steps=5),
            ),
            5,
            0.99,
        ),
    ],
)
def test_steps_of_the_user(kwargs, n_steps, gamma):
    given = copy.deepcopy(kwargs.get("replay_buffer_kwargs"))
    model = build(**kwargs)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (n_steps, gamma)
    assert kwargs.get("replay_buffer_kwargs") == given, "the dictionary is the user's"
    assert (model.n_steps, model.replay_buffer_class) == (kwargs.get("n_steps"), kwargs.get("replay_buffer_class"))


class Counting(gym.Env):
    """Observation and reward count the steps of all episodes, which never end by themselves; a reset counts a thousand."""

    observation_space = spaces.Box(0, 1e6, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    count = 0

    def reset(self, *, seed=None, options=None):
        self.count += 1000
        return np.full(1, self.count, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.full(1, self.count, np.float32), float(self.count), False, False, {}


@pytest.mark.parametrize("reset", [True, False])
def test_returns_end_where_the_environment_is_reset(reset):
    """A second call of learn() begins a new episode, unless the time goes on: no return of three steps reaches into it."""
    model = build(env=Counting(), learning_starts=100, gamma=0.5)
    model.learn(10)
    model.learn(10, reset_num_timesteps=reset)
    samples = model.replay_buffer._get_samples(np.arange(7, 12))
    nexts = [1010, 1010, 1010, 2013, 2014] if reset else [1010, 1011, 1012, 1013, 1014]
    assert samples.next_observations.ravel().tolist() == nexts
    assert samples.discounts.ravel().tolist() == ([0.125, 0.25, 0.5, 0.125, 0.125] if reset else [0.125] * 5)
    first = 1008 + 1009 / 2 + 1010 / 4
    assert samples.rewards[0].item() == first and (samples.dones == 0).all()


def learn_scaled(factor, **kwargs):
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: factor * reward)
    return build(env=env, n_steps=3, ent_coef=f"auto_{factor}", **kwargs).learn(60)


@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_scale_of_rewards_is_irrelevant(factor):
    """With powers of two and a temperature that starts in proportion, all but its logarithm is rounded alike."""
    plain, scaled = learn_scaled(1.0), learn_scaled(factor)
    np.testing.assert_allclose(vector(scaled.policy), vector(plain.policy), atol=1e-6)
    assert scaled.temperature.value() / plain.temperature.value() == pytest.approx(factor, rel=1e-5)
    assert scaled.critic.scale == factor * plain.critic.scale
    fixed = [learn_scaled(f, value_scale=1.0) for f in (1.0, factor)]
    assert not th.allclose(*(vector(model.policy) for model in fixed), atol=1e-3)


class Paying(gym.Env):
    """Pays two wages in turn; episodes of three steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, wages=(1, 2)):
        self.n_steps, self.wages = 0, wages

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.n_steps += 1
        return np.zeros(1, np.float32), float(self.wages[1 - self.n_steps % 2]), self.n_steps % 3 == 0, False, {}


def test_value_scale_by_hand():
    model = build(env=Paying(), learning_starts=4, batch_size=2).learn(5)
    scale = math.sqrt((1 + 4 + 1 + 4 + 1) / 5)
    assert model.critic.scale.item() == model.critic_target.scale.item() == pytest.approx(scale)
    obs, action = th.zeros(1, 1), th.ones(1, 1)
    networks = [q_network(th.cat([obs, action], dim=1)).item() for q_network in model.critic.q_networks]
    assert [q_value.item() for q_value in model.critic(obs, action)] == pytest.approx([scale * value for value in networks])
    assert model.critic.q1_forward(obs, action).item() == pytest.approx(scale * networks[0])


@pytest.mark.parametrize(("value_scale", "wages", "expected"), [("auto", [0, 0], 1), ("auto", [5, 5], 5), (4.0, [1, 2], 4)])
def test_value_scale_of_constant_rewards_or_fixed(value_scale, wages, expected):
    model = build(env=Paying(wages), value_scale=value_scale).learn(40)
    assert model.critic.scale.item() == model.critic_target.scale.item() == pytest.approx(expected)


def test_action_noise():
    model = run(action_noise=NormalActionNoise(np.zeros(1), np.full(1, 100.0)))
    # Added and clipped from the first random step on
    assert (np.abs(model.replay_buffer.actions[:30]) == 1).mean() > 0.9


def test_action_noise_of_several_environments():
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    run(env=make_vec_env("Pendulum-v1", n_envs=2, seed=0), total_timesteps=40, action_noise=noise)


def test_optimize_memory_usage():
    model = run(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    assert not hasattr(model.replay_buffer, "next_observations")


class NormalizedReplayBuffer(ReplayBuffer):
    """Refuses to hand out raw observations."""

    def sample(self, batch_size, env=None):
        assert isinstance(env, VecNormalize)
        return super().sample(batch_size, env)


def test_vec_normalize_and_custom_buffer():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1, seed=0))
    model = run(env=env, replay_buffer_class=NormalizedReplayBuffer)
    assert isinstance(model.replay_buffer, NormalizedReplayBuffer)


def rates(model):
    return [model.policy.online_actor.optimizer.param_groups[0]["lr"], model.policy.critic.optimizer.param_groups[0]["lr"]]


def test_learning_rate_schedule():
    model = run(learning_rate=lambda progress: 1e-3 * progress, total_timesteps=40)
    # The last update came after 40 of 40 steps
    assert rates(model) == pytest.approx([0.0, 0.0])
    assert rates(build(learning_rate=lambda progress: 1e-3 * progress)) == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("n_updates", [1, 5, 10])
def test_actor_lr_decay_updates(n_updates):
    model = build(learning_rate=1e-3, actor_lr_decay_updates=8).learn(20 + n_updates)
    # The rate of the last update, which n_updates - 1 went before
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, (n_updates - 1) / 8)))
    assert model._n_updates == n_updates
    assert rates(model) == pytest.approx([1e-3 * cosine, 1e-3])


def test_actor_lr_is_constant_by_default():
    assert rates(run(learning_rate=1e-3)) == [1e-3, 1e-3]


@pytest.mark.parametrize("share", [True, False])
def test_share_features_extractor(share):
    env = SimpleMultiObsEnv(random_start=True, discrete_actions=False, channel_last=False)
    extractor = dict(features_extractor_kwargs=dict(cnn_output_dim=16), share_features_extractor=share)
    model = run("MultiInputPolicy", env, total_timesteps=25, policy_kwargs=extractor)
    actor, critic = model.online_actor.features_extractor, model.critic.features_extractor
    assert (actor is critic) == share
    assert model.critic_target.features_extractor is not critic
    trained = {id(parameter) for group in model.critic.optimizer.param_groups for parameter in group["params"]}
    # A shared extractor learns from the actor's loss only
    assert {id(parameter) in trained for parameter in critic.parameters()} == {not share}


@pytest.mark.parametrize("n_critics", [1, 3])
def test_n_critics(n_critics):
    model = run(policy_kwargs=dict(n_critics=n_critics))
    for critic in (model.critic, model.critic_target):
        assert [q_value.shape for q_value in critic(th.zeros(5, 3), th.zeros(5, 1))] == [(5, 1)] * n_critics


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=1e-3)),
        dict(optimizer_class=th.optim.RMSprop),
        dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.9)),
        dict(optimizer_kwargs=dict(eps=1e-5)),
    ],
)
def test_optimizers(policy_kwargs):
    model = run(policy_kwargs=policy_kwargs)
    for optimizer in (model.online_actor.optimizer, model.critic.optimizer):
        assert type(optimizer) is policy_kwargs.get("optimizer_class", th.optim.Adam)
        assert policy_kwargs.get("optimizer_kwargs", {}).items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize("net_arch", [[], [8, 4], dict(pi=[], qf=[8]), dict(pi=[8], qf=[])])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_net_arch(net_arch, layer_norm):
    model = run(policy_kwargs=dict(net_arch=net_arch, layer_norm=layer_norm, activation_fn=nn.Tanh))
    layers = [nn.Linear, LayerNorm, nn.Tanh] if layer_norm else [nn.Linear, nn.Tanh]
    n_hidden = len(net_arch["qf"] if isinstance(net_arch, dict) else net_arch)
    assert [type(layer) for layer in model.critic.qf0] == layers * n_hidden + [nn.Linear]


def test_critics_of_the_results():
    """Results note the constructor's defaults (see test_benchmarks.py); these are the policy's."""
    critics = QSM("MlpPolicy", "Pendulum-v1", device="cpu").critic.q_networks
    layers = [nn.Linear, LayerNorm, nn.Hardswish] * 2 + [nn.Linear]
    assert [[type(layer) for layer in critic] for critic in critics] == [layers, layers]
    assert [layer.out_features for layer in critics[0] if isinstance(layer, nn.Linear)] == [256, 256, 1]


@pytest.mark.parametrize("score_target", SCORE_TARGETS)
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_every_diffusion(beta_schedule, sampler, preconditioning, score_target):
    choices = dict(beta_schedule=beta_schedule, sampler=sampler, preconditioning=preconditioning, n_diffusion_steps=3)
    run(total_timesteps=24, score_target=score_target, policy_kwargs=choices)


def idle_score(q_fn, denoised, noisy_actions, alpha, sigma, ent_coef):
    """Whatever Q says, no action."""
    return th.zeros_like(denoised), th.zeros_like(denoised)


def test_own_score_target(tmp_path):
    model = run(score_target=idle_score)
    model.save(tmp_path / "model")
    assert QSM.load(tmp_path / "model")._score_target(None, *[th.ones(1, 1)] * 5)[1].item() == 0.0


@pytest.mark.parametrize("n_diffusion_steps", [1, 2, 20])
def test_n_diffusion_steps(n_diffusion_steps):
    model = run(policy_kwargs=dict(n_diffusion_steps=n_diffusion_steps))
    assert model.actor.noise_schedule.n_steps == n_diffusion_steps


class LinearDenoiser(Denoiser):
    """The least that a denoiser of one's own must have."""

    def __init__(self, features_dim, action_dim, n_diffusion_steps, net_arch, bias=True):
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch)
        self.layer = nn.Linear(features_dim + action_dim, action_dim, bias=bias)

    def forward(self, features, noisy_actions, t):
        return self.layer(th.cat([features, noisy_actions], dim=1))


def test_parts_of_ones_own():
    parts = dict(beta_schedule=vp_betas, sampler=ddim_sample, preconditioning=noise_preconditioning)
    denoiser = dict(denoiser_class=LinearDenoiser, denoiser_kwargs=dict(bias=False))
    model = run(policy_kwargs=parts | denoiser)
    assert type(model.actor.denoiser) is LinearDenoiser and model.actor.denoiser.layer.bias is None
    np.testing.assert_allclose(model.actor.noise_schedule.betas, vp_betas(6), rtol=1e-6)


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


def test_batch_norm_statistics_reach_the_target():
    model = run(policy_delay=1, policy_kwargs=dict(features_extractor_class=BatchNormExtractor))
    for network, slow_copy in ((model.critic, model.critic_target), (model.online_actor, model.actor)):
        online, slow = (module.features_extractor.norm for module in (network, slow_copy))
        assert online.running_mean.abs().max() > 0
        # The actor's loss, which comes after the critic's, moves the statistics again: the copy must come last
        assert th.equal(online.running_mean, slow.running_mean) and th.equal(online.running_var, slow.running_var)


def test_modes():
    policy = build().policy
    policy.set_training_mode(True)
    assert policy.training and policy.online_actor.training and policy.critic.training
    assert not policy.actor.training and not policy.critic_target.training
    policy.set_training_mode(False)
    assert not any(module.training for module in policy.modules())
    policy.online_actor.train(), policy.actor.train()  # behind its back
    policy.set_training_mode(False)
    assert not policy.online_actor.training and not policy.actor.training
    policy.train()
    assert policy.critic.training and not policy.critic_target.training


def test_modes_with_a_shared_features_extractor():
    """It learns with the networks, though a slow copy uses it, too."""
    policy = build(policy_kwargs=dict(share_features_extractor=True)).policy
    assert policy.actor.features_extractor is policy.online_actor.features_extractor
    for mode in (True, False, True):
        policy.set_training_mode(mode)
        assert policy.online_actor.features_extractor.training == mode
        assert policy.critic_target.features_extractor.training is False


@pytest.mark.parametrize("interval, n_updates, moved", [(1, 1, True), (3, 2, False), (3, 3, True)])
def test_target_update_interval(interval, n_updates, moved):
    model = build(tau=1.0, target_update_interval=interval).learn(20 + n_updates)
    assert th.equal(vector(model.critic), vector(model.critic_target)) == moved


@pytest.mark.parametrize("n_updates", [1, 2])
def test_actor_follows_the_one_that_learns(n_updates):
    """At the first update of the actor, of which there is one in the first two of the critics, 9/10 of the way."""
    model = build(actor_tau=0.25)
    before = vector(model.actor)
    assert th.equal(before, vector(model.online_actor))
    model.learn(20 + n_updates)
    learnt = vector(model.online_actor)
    assert not th.equal(before, learnt)
    th.testing.assert_close(vector(model.actor), 0.1 * before + 0.9 * learnt)
    # Later a quarter
    model._n_updates = 100 * model.policy_delay
    before = vector(model.actor)
    model.train(1, 8)
    th.testing.assert_close(vector(model.actor), 0.75 * before + 0.25 * vector(model.online_actor))


def test_the_actor_that_learns_explores():
    model = build(learning_starts=0)
    model.actor.forward, model.online_actor.forward = (
        lambda obs, deterministic=False, value=value: th.full((len(obs), 1), value) for value in (0.25, -0.5)
    )
    model.learn(5)
    assert (model.replay_buffer.actions[:5] == -0.5).all()
    assert model.predict(np.zeros(3))[0] == pytest.approx(2 * 0.25)  # the pendulum's torque


@pytest.mark.parametrize("delay, n_updates, n_actor_updates", [(1, 3, 3), (2, 1, 1), (2, 2, 1), (2, 3, 2), (3, 7, 3)])
def test_policy_delay(delay, n_updates, n_actor_updates):
    """The first update is one of both; the temperature moves with the actor only, the critics each time."""
    model = build(policy_delay=delay)
    moved = []
    model.temperature.update = lambda entropy: moved.append(entropy) or entropy
    model.learn(20 + n_updates)
    steps = [int(o.state_dict()["state"][0]["step"]) for o in (model.critic.optimizer, model.online_actor.optimizer)]
    assert [*steps, len(moved)] == [n_updates, n_actor_updates, n_actor_updates]


class LastDump(KVWriter):
    """Keeps what was logged last."""

    def write(self, key_values, key_excluded, step=0):
        self.values = dict(key_values)

    def close(self):
        pass


def test_metrics():
    writer = LastDump()
    model = build(env=gym.make("Pendulum-v1", max_episode_steps=10), ent_coef="auto_0.3", learning_rate=1e-3)
    model.set_logger(Logger(None, [writer]))
    model.learn(40, log_interval=1)
    names = ["critic_loss", "actor_loss", "ent_coef", "ent_coef_loss", "entropy", "q_grad", "action_std", "saturation"]
    assert all(math.isfinite(writer.values[f"train/{name}"]) for name in names)
    assert writer.values["train/value_scale"] == pytest.approx(model.critic.scale.item(), rel=0.1) != 1
    assert writer.values["train/n_updates"] == 19 and writer.values["train/learning_rate"] == 1e-3
    assert 0 <= writer.values["train/saturation"] <= 1 and 0 < writer.values["train/action_std"] < 1.1
    assert model.temperature.value() < writer.values["train/ent_coef"] < 0.3, "the mean of a temperature that falls"
    assert writer.values["time/total_timesteps"] == 40


def set_critic(critic, slopes, values):
    """Make the i-th critic of one without hidden layers Q_i = slopes[i] * action + values[i]."""
    for q_net, slope, value in zip(critic.q_networks, slopes, values, strict=True):
        (layer,) = (module for module in q_net if isinstance(module, nn.Linear))
        layer.weight.data.zero_()
        layer.weight.data[0, -1] = slope
        layer.bias.data.fill_(value)


LINEAR_CRITIC = dict(net_arch=dict(pi=[8], qf=[]), layer_norm=False)
BATCH = ReplayBufferSamples(
    observations=th.zeros(2, 3),
    actions=th.tensor([[0.5], [-0.5]]),
    next_observations=th.ones(2, 3),
    dones=th.tensor([[0.0], [1.0]]),
    rewards=th.tensor([[1.0], [2.0]]),
)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_critic_loss_by_hand(scale):
    model = build(policy_kwargs=LINEAR_CRITIC, gamma=0.5, value_scale=scale)
    model._set_value_scale()
    set_critic(model.critic, slopes=[1.0 / scale, 0.0], values=[0.0, 3.0 / scale])
    set_critic(model.critic_target, slopes=[0.0, 0.0], values=[4.0 / scale, 6.0 / scale])
    # The next value is 4.5, halfway from the mean to the smallest of 4 and 6: targets 1 + 0.5 * 4.5 = 3.25 and 2 (the
    # episode ended); values (0.5, -0.5) and (3, 3)
    expected = (2.75**2 + 2.5**2) / 2 + (0.25**2 + 1) / 2
    assert model._critic_loss(BATCH).item() == pytest.approx(expected / scale**2)
    # The discounts of n-step returns replace gamma: 1 + 0.25 * 4.5 = 2.125
    discounted = BATCH._replace(discounts=th.full((2, 1), 0.25))
    assert model._critic_loss(discounted).item() == pytest.approx(((1.625**2 + 2.5**2) / 2 + (0.875**2 + 1) / 2) / scale**2)


@pytest.mark.parametrize("pessimism, next_value", [(0.0, 6.0), (0.25, 5.0), (1.0, 2.0)])
def test_pessimism_goes_from_the_mean_to_the_smallest(pessimism, next_value):
    model = build(policy_kwargs=LINEAR_CRITIC | dict(n_critics=3), gamma=0.5, pessimism=pessimism)
    set_critic(model.critic, slopes=[0.0] * 3, values=[0.0] * 3)
    set_critic(model.critic_target, slopes=[0.0] * 3, values=[4.0, 12.0, 2.0])
    # Targets 1 + 0.5 * next_value and 2 (the episode ended), values 0
    expected = 3 * ((1 + 0.5 * next_value) ** 2 + 2**2) / 2
    assert model._critic_loss(BATCH).item() == pytest.approx(expected)


@pytest.mark.parametrize("target_policy_noise", [0.0, 1e6])
def test_critic_loss_looks_at_the_next_action(target_policy_noise):
    model = build(policy_kwargs=LINEAR_CRITIC, gamma=1.0, target_policy_noise=target_policy_noise)
    set_critic(model.critic, slopes=[0.0, 0.0], values=[0.0, 0.0])
    set_critic(model.critic_target, slopes=[1.0, 1.0], values=[0.0, 0.0])
    for parameter in model.actor.parameters():  # the running mean has no say
        parameter.data.fill_(math.nan)
    batch = ReplayBufferSamples(*(value[:1].expand(50, -1) for value in BATCH[:5]))
    loss = model._critic_loss(batch).item() / 2
    # Targets are 1 + a: with a on either bound they are 0 or 2, with a mean square between 0 and 4
    assert 0 < loss < 4
    if target_policy_noise:
        assert (loss / 4 * 50) == pytest.approx(round(loss / 4 * 50), abs=1e-3)


@pytest.mark.parametrize("score_target", SCORE_TARGETS)
def test_actor_follows_the_online_critics(score_target):
    """Of slopes 1 and 3 it climbs the mean; the target critics, here broken, have no say."""
    model = build(policy_kwargs=LINEAR_CRITIC, ent_coef=0.5, score_target=score_target)
    model.set_logger(Logger(None, []))
    set_critic(model.critic, slopes=[1.0, 3.0], values=[0.0, 0.0])
    set_critic(model.critic_target, slopes=[math.nan, math.nan], values=[math.nan, math.nan])
    assert math.isfinite(model._actor_loss(BATCH).item())
    model._log_metrics()
    logged = model.logger.name_to_value
    assert logged["train/q_grad"] == pytest.approx(2.0)
    assert logged["train/entropy"] == pytest.approx(box_entropy(th.tensor(2.0 / 0.5)).item())
    assert logged["train/ent_coef"] == pytest.approx(0.5)
    assert all(parameter.grad is None for parameter in model.critic.parameters())


def test_entropy_is_the_sum_over_dimensions():
    model = build(env="Reacher-v5", policy_kwargs=LINEAR_CRITIC, ent_coef=0.5)
    model.set_logger(Logger(None, []))
    set_critic(model.critic, slopes=[2.0, 2.0], values=[0.0, 0.0])  # in the last of two dimensions
    model._actor_loss(BATCH._replace(observations=th.zeros(2, 10), actions=th.zeros(2, 2)))
    model._log_metrics()
    expected = box_entropy(th.tensor(2.0 / 0.5)).item() + math.log(2)
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("score_target", SCORE_TARGETS)
def test_actor_loss_by_hand(score_target):
    """A denoiser that answers 0 leaves a_0 = c_skip a_t, whose distance to the target is the loss."""
    model = build(policy_kwargs=LINEAR_CRITIC, ent_coef=0.5, score_target=score_target)
    model.set_logger(Logger(None, []))
    set_critic(model.critic, slopes=[1.0, 3.0], values=[0.0, 0.0])
    for parameter in model.online_actor.denoiser.parameters():
        parameter.data.zero_()
    batch = ReplayBufferSamples(*(value[:1].expand(50_000, -1) for value in BATCH[:5]))
    loss = model._actor_loss(batch).item()

    t = th.arange(50_000) % 6
    noise = th.randn((50_000, 1), generator=th.Generator().manual_seed(1))
    ratio = 0.1 * 25 ** (t[:, None] / 5)
    alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    noisy_actions = 0.5 * alpha + sigma * noise
    # The normal around a_t / alpha, moved by r^2 g / lambda = 4 r^2 or 4 r, on the box
    target = {
        "box": truncated_normal_mean(noisy_actions / alpha + ratio * (4 * ratio).clamp(max=4), ratio),
        "published": (noisy_actions + 4 * sigma) / alpha,  # noise -g / lambda = -4
    }[score_target]
    skip = 0.36 / (0.36 + ratio**2) / alpha
    out = 0.6 * ratio / (0.36 + ratio**2).sqrt()
    expected = (((skip * noisy_actions - target) / out) ** 2).mean().item()
    assert loss == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("denoiser_class", DENOISERS)
@pytest.mark.parametrize("score_target", SCORE_TARGETS)
def test_update_never_waits_for_the_device(score_target, denoiser_class):
    """Tensors without data stand for those of a GPU: ``.item()`` or a branch on a value would raise."""
    model = build(score_target=score_target, policy_kwargs=dict(denoiser_class=denoiser_class))
    model.policy.to("meta")
    model.temperature.to("meta")
    model.device = th.device("meta")
    batch = ReplayBufferSamples(*(value.to("meta") for value in BATCH[:5]))
    for loss in (model._critic_loss(batch), model._actor_loss(batch)):
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.critic.parameters())
    assert len(model._metrics) == 4
    with pytest.raises(RuntimeError, match="meta"):
        model._log_metrics()


@pytest.mark.expensive
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_sampling(tmp_path):
    """It is really compiled, learns and acts as the plain chain does for any batch size, and survives copies and files."""
    kwargs = dict(net_arch=[16, 16], n_diffusion_steps=2)
    th._dynamo.reset()
    compiled, plain = (run(policy_kwargs=kwargs | dict(compile_sampling=choice)) for choice in (True, False))
    assert th._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and not th._dynamo.utils.counters["graph_break"]
    for name, weight in compiled.policy.state_dict().items():
        np.testing.assert_allclose(weight, plain.policy.state_dict()[name], atol=1e-5, err_msg=name)
    compiled.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model")
    assert "sample" in vars(loaded.actor)
    for n in (1, 2, 3, 7):
        observations = np.random.default_rng(n).uniform(-1, 1, (n, 3)).astype(np.float32)
        expected = plain.predict(observations, deterministic=True)[0]
        for policy in (compiled, loaded, copy.deepcopy(compiled.policy), pickle.loads(pickle.dumps(compiled.policy))):
            np.testing.assert_allclose(policy.predict(observations, deterministic=True)[0], expected, atol=1e-5)

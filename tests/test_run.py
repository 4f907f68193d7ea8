"""QSM does everything that SB3's off-policy algorithms do; a few steps each."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her import HerReplayBuffer
from torch import nn

from sb3_qsm import QSM, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.buffers import NStepDictReplayBuffer, NStepReplayBuffer
from sb3_qsm.losses import SCORE_TARGETS
from sb3_qsm.networks import PRECONDITIONINGS, Denoiser, noise_preconditioning
from sb3_qsm.policies import LayerNorm
from sb3_qsm.samplers import SAMPLERS, ddim_sample
from sb3_qsm.schedules import SCHEDULES, vp_ratios

SMALL = dict(learning_starts=20, batch_size=8, buffer_size=500, seed=0, device="cpu")


def build(policy="MlpPolicy", env="Pendulum-v1", **kwargs):
    kwargs["policy_kwargs"] = dict(net_arch=[16]) | kwargs.get("policy_kwargs", {})
    return QSM(policy, env, **SMALL | kwargs)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def run(*args, total_timesteps=30, **kwargs):
    """Train a small model: actor and critics move, and every weight stays finite."""
    model = build(*args, **kwargs)
    modules = [model.actor.denoiser, model.actor.average, model.critic, model.critic_target]
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
    "buffer_class, n_steps, kwargs",
    [
        (NStepReplayBuffer, 3, dict()),
        (NStepReplayBuffer, 2, dict(n_steps=2)),
        (NStepDictReplayBuffer, 3, dict(policy="MultiInputPolicy", env=SimpleMultiObsEnv(discrete_actions=False))),
    ],
)
def test_returns_over_several_steps(buffer_class, n_steps, kwargs, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 would take the buffer's class for the user's
        model = run(**kwargs)
        model.save(tmp_path / "model")
        loaded = QSM.load(tmp_path / "model", env=model.env, gamma=0.5)
    assert type(model.replay_buffer) is type(loaded.replay_buffer) is buffer_class
    assert model.replay_buffer.n_steps == loaded.replay_buffer.n_steps == n_steps
    assert (model.replay_buffer.gamma, loaded.replay_buffer.gamma) == (0.99, 0.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_steps=1),
        dict(keep_modes=True),
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
    return [model.policy.actor.optimizer.param_groups[0]["lr"], model.policy.critic.optimizer.param_groups[0]["lr"]]


def test_learning_rate_schedule():
    model = run(learning_rate=lambda progress: 1e-3 * progress, total_timesteps=40)
    # The last update came after 40 of 40 steps
    assert rates(model) == pytest.approx([0.0, 0.0])
    assert rates(build(learning_rate=lambda progress: 1e-3 * progress)) == pytest.approx([1e-3, 1e-3])


def test_learning_rate_is_constant_by_default():
    assert rates(run(learning_rate=1e-3)) == [1e-3, 1e-3]


@pytest.mark.parametrize("share", [True, False])
def test_share_features_extractor(share):
    env = SimpleMultiObsEnv(random_start=True, discrete_actions=False, channel_last=False)
    extractor = dict(features_extractor_kwargs=dict(cnn_output_dim=16), share_features_extractor=share)
    model = run("MultiInputPolicy", env, total_timesteps=25, policy_kwargs=extractor)
    actor, critic = model.actor.features_extractor, model.critic.features_extractor
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
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
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
    layers = [nn.Linear, nn.Hardswish] * 2 + [nn.Linear]
    assert [[type(layer) for layer in critic] for critic in critics] == [layers, layers]
    assert [layer.out_features for layer in critics[0] if isinstance(layer, nn.Linear)] == [128, 128, 1]


@pytest.mark.parametrize("score_target", SCORE_TARGETS)
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_every_diffusion(noise_schedule, sampler, preconditioning, score_target):
    choices = dict(noise_schedule=noise_schedule, sampler=sampler, preconditioning=preconditioning, n_diffusion_steps=3)
    run(total_timesteps=24, score_target=score_target, policy_kwargs=choices)


def idle_score(q_fn, denoised, variance, noisy_actions, ratio, ent_coef):
    """Whatever Q says, no action."""
    return th.zeros_like(denoised), th.zeros_like(denoised)


def test_own_score_target(tmp_path):
    model = run(score_target=idle_score)
    model.save(tmp_path / "model")
    assert QSM.load(tmp_path / "model")._score_target(None, *[th.ones(1, 1)] * 5)[1].item() == 0.0


@pytest.mark.parametrize("n_diffusion_steps", [1, 2, np.int64(4), 20])
def test_n_diffusion_steps(n_diffusion_steps):
    model = run(policy_kwargs=dict(n_diffusion_steps=n_diffusion_steps))
    assert len(model.actor.levels) == n_diffusion_steps


class LinearDenoiser(Denoiser):
    """The least that a denoiser of one's own must have."""

    def __init__(self, features_dim, action_dim, n_diffusion_steps, net_arch, output_dim, bias=True):
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch, output_dim)
        self.layer = nn.Linear(features_dim + action_dim, output_dim, bias=bias)

    def forward(self, features, noisy_actions, t):
        return self.layer(th.cat([features, noisy_actions], dim=1))


def test_parts_of_ones_own():
    parts = dict(noise_schedule=vp_ratios, sampler=ddim_sample, preconditioning=noise_preconditioning)
    denoiser = dict(denoiser_class=LinearDenoiser, denoiser_kwargs=dict(bias=False))
    model = run(policy_kwargs=parts | denoiser)
    assert type(model.actor.denoiser) is LinearDenoiser and model.actor.denoiser.layer.bias is None
    np.testing.assert_allclose(model.actor.ratios, vp_ratios(6), rtol=1e-6)


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


def test_batch_norm_statistics_reach_the_target():
    model = run(policy_delay=1, policy_kwargs=dict(features_extractor_class=BatchNormExtractor))
    actor = model.actor
    pairs = [
        (model.critic.features_extractor, model.critic_target.features_extractor),
        (actor.features_extractor, actor.average["features_extractor"]),
    ]
    for online, slow in pairs:
        assert online.norm.running_mean.abs().max() > 0
        # The actor's loss, which comes after the critic's, moves the statistics again: the copy must come last
        assert th.equal(online.norm.running_mean, slow.norm.running_mean)
        assert th.equal(online.norm.running_var, slow.norm.running_var)


@pytest.mark.parametrize("share", [True, False])
def test_modes(share):
    """The target critics and the actor's mean never learn by themselves, so they stay in evaluation mode."""
    policy = build(policy_kwargs=dict(share_features_extractor=share)).policy
    for mode in (True, False, True):
        policy.set_training_mode(mode)
        learning = [policy, policy.actor, policy.actor.features_extractor, policy.critic, policy.critic.features_extractor]
        assert [module.training for module in learning] == [mode] * 5
        assert not any(module.training for part in (policy.critic_target, policy.actor.average) for module in part.modules())
    policy.actor.train(), policy.set_training_mode(False), policy.actor.train(), policy.set_training_mode(False)
    assert not policy.actor.training

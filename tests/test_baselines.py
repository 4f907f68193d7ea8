import numpy as np
import pytest
import torch as th
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.type_aliases import ReplayBufferSamples

pytest.importorskip("rl_zoo3")

from benchmarks.algorithms import ALGORITHMS, algorithm_class
from benchmarks.baselines import DIPO, QVPO, DACERStyle, DiffusionQL, InwardClamp, best_of
from benchmarks.environments import Bandit
from benchmarks.gaussian import SACActor, TD3Actor
from sb3_qsm import QSM

OPTIMUM = np.array([0.5, -0.3])
SMALL = dict(
    net_arch=[32, 32],
    embedding_dim=None,
    layer_norm=True,
    denoiser_class="mlp",
    n_diffusion_steps=3,
    noise_schedule="cosine",
    preconditioning="noise",
)
BASELINES = {
    DiffusionQL: {},
    DIPO: dict(n_action_steps=5, action_lr=0.1),
    QVPO: dict(n_samples=8),
    DACERStyle: dict(entropy_interval=50, normalize_reward=False),
}


def bandit_model(cls, n_steps=300, **kwargs):
    """On a bandit with one optimum, with ``n_steps`` random actions in the buffer and nothing learnt yet."""
    settings = dict(
        learning_rate=2e-3,
        ema_decay=0.0,
        learning_starts=n_steps,
        buffer_size=5000,
        seed=0,
        device="cpu",
        policy_kwargs=SMALL,
    )
    return cls("MlpPolicy", Bandit([OPTIMUM]), **{**settings, **BASELINES[cls], **kwargs}).learn(n_steps)


def batch(model, size=64):
    return model.replay_buffer.sample(size)


def give_critics(model, value):
    """Make both critics return ``value(actions)``, shape (B, 1), whatever they have learnt."""
    for critics in (model.critic, model.critic_target):
        critics.forward = lambda observations, actions: (value(actions), value(actions))


def distance_to_optimum(model):
    actions, _ = model.predict(np.zeros((300, 1), np.float32))
    return np.linalg.norm(actions - OPTIMUM, axis=1).mean()


@pytest.mark.parametrize("cls", BASELINES)
def test_bandit_is_learnt(cls):
    model = bandit_model(cls)
    before = distance_to_optimum(model)
    model.train(250, 64)
    # QVPO imitates uniform actions, too, and noise is added to those of the DACER-style method
    assert distance_to_optimum(model) < {QVPO: 0.5, DACERStyle: 0.7}.get(cls, 0.3) < before


@pytest.mark.parametrize("cls", BASELINES)
def test_save_and_load(cls, tmp_path):
    model = bandit_model(cls, 10)
    model.train(2, 8)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    observation = np.zeros((3, 1), np.float32)
    assert np.array_equal(*(it.predict(observation, deterministic=True)[0] for it in (model, loaded)))
    for name in BASELINES[cls]:
        assert getattr(loaded, name) == BASELINES[cls][name]


@pytest.mark.parametrize("cls", BASELINES)
def test_comparison_is_of_actor_losses(cls):
    assert cls._actor_loss is not QSM._actor_loss
    for name in ("train", "predict", "_critic_loss"):
        assert getattr(cls, name) is getattr(QSM, name)


def test_baselines_have_names():
    assert {algorithm_class(name) for name in ALGORITHMS} >= set(BASELINES)


# === Diffusion-QL ===


def test_diffusion_ql_climbs_q_through_the_chain():
    model = bandit_model(DiffusionQL, eta=1e3)  # the denoising loss is negligible
    slope = th.tensor([1.0, -1.0])
    give_critics(model, lambda actions: 3 + (actions * slope).sum(dim=1, keepdim=True))
    observations = batch(model).observations
    noise = th.randn(4, 64, 2)

    def value():
        return (model.actor.sample(observations, noise) * slope).sum(dim=1).mean().item()

    before = value()
    for _ in range(20):
        model.actor.optimizer.zero_grad()
        model._loss(batch(model)).backward()
        model.actor.optimizer.step()
    assert value() > before + 0.1


def test_diffusion_ql_is_blind_to_the_scale_of_q():
    gradients = []
    for scale in (1.0, 100.0):
        model = bandit_model(DiffusionQL, 50)
        give_critics(model, lambda actions, scale=scale: scale * (3 + actions[:, :1]))
        th.manual_seed(0)
        np.random.seed(0)
        model._loss(batch(model, 16)).backward()
        gradients.append(th.cat([weight.grad.flatten() for weight in model.actor.parameters() if weight.requires_grad]))
    th.testing.assert_close(*gradients)


def test_diffusion_ql_without_q_is_denoising():
    model = bandit_model(DiffusionQL, 50, eta=0.0)
    data = batch(model, 16)
    losses = []
    for loss in (lambda: model._loss(data), lambda: model._denoising_loss(data.observations, data.actions)):
        losses.append(np.mean([loss().item() for _ in range(150)]))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_denoising_loss_is_that_of_the_noise():
    model = bandit_model(DiffusionQL, 50)
    data = batch(model, 16)
    th.manual_seed(0)
    loss = model._denoising_loss(data.observations, data.actions)
    th.manual_seed(0)
    t = th.randint(3, (16,))
    noise, ratio = th.randn_like(data.actions), model.actor.ratios[t, None]
    noisy_actions = data.actions + ratio * noise
    predicted_noise = (noisy_actions - model.actor.denoise(data.observations, noisy_actions, t)[0]) / ratio
    assert loss.item() == pytest.approx(((predicted_noise - noise) ** 2).mean().item(), rel=1e-4)


# === DIPO ===


def test_dipo_improves_actions_and_stays_in_the_box():
    model = bandit_model(DIPO)
    model.train(60, 64)
    data = batch(model)
    improved = model._improve(data.observations, data.actions)
    before, after = (model._q_values(data.observations, it).min(dim=1).values for it in (data.actions, improved))
    assert (after > before).float().mean() > 0.9 and after.mean() > before.mean()
    assert improved.abs().max() <= 1


def test_dipo_goes_on_from_improved_actions():
    model = bandit_model(DIPO, 1, action_lr=0.01)
    give_critics(model, lambda actions: actions.sum(dim=1, keepdim=True))
    taken = model.replay_buffer.actions[0].copy()
    for visit in range(1, 4):
        model._loss(batch(model))
        # Adam on a constant slope: 5 steps of 0.01
        assert model.replay_buffer.improved_actions[0] == pytest.approx(np.minimum(taken + 0.05 * visit, 1), abs=1e-5)
    assert np.array_equal(model.replay_buffer.actions[0], taken), "the critics learn from the actions that were taken"


def test_dipo_buffer_overwrites_improved_actions():
    model = bandit_model(DIPO, 10, buffer_size=10, learning_starts=100)
    model.replay_buffer.improved_actions[:] = 7
    model.learn(4, reset_num_timesteps=False)
    assert np.array_equal(model.replay_buffer.improved_actions[:4], model.replay_buffer.actions[:4])
    assert (model.replay_buffer.improved_actions[4:] == 7).all()


# === QVPO ===


def test_qvpo_weights_by_hand():
    samples = th.arange(6.0).reshape(3, 2, 1)  # three samples for two observations
    actions, weights = best_of(samples, th.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]]))
    assert actions.tolist() == [[2.0], [1.0]], "the best of each column"
    assert weights.tolist() == [[1.0], [0.0]], "3 - 2, and nothing to learn where all are as good"


def test_qvpo_learns_nothing_from_a_flat_q():
    model = bandit_model(QVPO, 20)
    give_critics(model, lambda actions: th.ones(len(actions), 1))
    assert model._loss(batch(model, 16)).item() == 0.0


def test_qvpo_entropy_term_imitates_uniform_actions():
    losses = []
    for entropy_coef in (0.0, 1.0, 2.0):
        model = bandit_model(QVPO, 100, entropy_coef=entropy_coef)
        th.manual_seed(0)
        losses.append(model._loss(batch(model, 16)).item())
    assert losses[1] - losses[0] > losses[0] > 0, "ten uniform actions for one of the policy's"
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


# === DACER-style ===


def test_inward_clamp_by_hand():
    x = th.tensor([-2.0, -2.0, -0.5, 0.5, 2.0, 2.0], requires_grad=True)
    y = InwardClamp.apply(x)
    assert y.tolist() == [-1.0, -1.0, -0.5, 0.5, 1.0, 1.0]
    y.backward(th.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0]))
    # Descent moves against the gradient: kept are the first (up from -2) and the fifth (down from 2)
    assert x.grad.tolist() == [-1.0, 0.0, 1.0, -1.0, 1.0, 0.0]


def test_dacer_noise_grows_when_the_entropy_is_too_low_and_shrinks_when_too_high():
    for target, direction in ((2.0, 1), (-20.0, -1)):  # log 4 = 1.39 is the most that two dimensions in [-1, 1] can have
        model = bandit_model(DACERStyle, 20, target_entropy=target, entropy_interval=2)
        before = model._noise_std()
        model.train(1, 16)
        moved = model._noise_std()
        assert direction * (moved - before) > 0
        model.train(1, 16)
        assert model._noise_std() == moved, "between two estimates it stays"


def test_dacer_target_follows_the_noise():
    model = bandit_model(DACERStyle, 20)
    model.actor.sample = lambda obs, noise: th.zeros(len(obs), 2)
    for log_alpha in (0.0, np.log(3)):
        model.temperature.log_ent_coef.data.fill_(log_alpha)
        actions = model._next_actions(th.zeros(5000, 1))
        assert actions.std().item() == pytest.approx(0.1 * np.exp(log_alpha), rel=0.1)


def test_dacer_target_entropy_is_its_authors():
    assert bandit_model(DACERStyle, 1).target_entropy == pytest.approx(-1.8)
    assert bandit_model(DACERStyle, 1)._noise_std().item() == pytest.approx(0.1 * np.exp(1.2), rel=1e-3)


def test_dacer_entropy_of_known_policies():
    model = bandit_model(DACERStyle, 1, noise_scale=0.0)
    observations = th.zeros(20, 1)
    for std in (0.05, 0.2):
        model._noisy_sample = lambda it, std=std: std * th.randn(len(it), 2)
        expected = 2 * np.log(std * np.sqrt(2 * np.pi * np.e))
        assert model._entropy(observations).item() == pytest.approx(expected, abs=0.15)
    model._noisy_sample = lambda it: th.ones(len(it), 2)
    assert -25 < model._entropy(observations).item() < -10, "a point has no entropy, but a number"


def test_dacer_acts_with_noise_that_follows_its_temperature():
    model = bandit_model(DACERStyle, 20)
    model.actor.sample = lambda obs, noise: th.zeros(len(obs), 2)
    spreads = []
    for log_alpha in (0.0, np.log(3)):
        model.temperature.log_ent_coef.data.fill_(log_alpha)
        spreads.append(np.std([model._sample_action(0)[0] for _ in range(500)]))
    assert spreads == pytest.approx([0.1, 0.3], rel=0.1)


def gaussian(cls, env="Reacher-v5", **kwargs):
    settings = dict(learning_starts=10, batch_size=8, seed=0, device="cpu", policy_kwargs=dict(net_arch=[16], embedding_dim=8))
    return cls("MlpPolicy", env, **settings | kwargs)


def test_density_of_the_squashed_normal():
    """As SB3's distribution says."""
    actor = gaussian(SACActor).actor
    obs, noise = th.randn(20, 10), 2 * th.randn(2, 20, 2)
    actions, log_prob = actor.sample_with_log_prob(obs, noise)
    features = actor.extract_features(obs, actor.features_extractor)
    mean, log_std = actor.denoiser(features, None, 0).chunk(2, dim=1)
    expected = SquashedDiagGaussianDistribution(2).proba_distribution(mean, log_std)
    th.testing.assert_close(actions, (mean + log_std.exp() * noise[0]).tanh())
    th.testing.assert_close(log_prob[:, 0], expected.log_prob(actions), rtol=1e-3, atol=1e-2)


def test_sac_counts_entropy():
    """In the next value, and with the same weight in the actor's loss; temperature 0.5 in rewards of 2."""
    model = gaussian(SACActor, ent_coef=0.5)
    model.reward_scale.rms.fill_(2.0)
    model._value = lambda critic, obs, actions: th.full((len(obs), 1), 3.0 if critic is model.critic_target else 5.0)
    model.actor.sample_with_log_prob = lambda obs, noise: (th.zeros(len(obs), 2), th.full((len(obs), 1), -1.5))
    obs = th.zeros(4, 10)
    assert model._next_values(obs).flatten().tolist() == [3 + 0.25 * 1.5] * 4
    batch = ReplayBufferSamples(obs, th.zeros(4, 2), obs, th.zeros(4, 1), th.zeros(4, 1))
    loss, entropy, _ = model._actor_loss(batch, th.tensor(0.0))
    assert loss.item() == pytest.approx(-5 - 0.25 * 1.5) and entropy.item() == pytest.approx(1.5)
    assert model.target_entropy == -2


def test_td3_is_deterministic_but_for_its_noise():
    model = gaussian(TD3Actor, learning_starts=0)
    obs = np.zeros(10, np.float32)
    first, second = (model.predict(obs, deterministic=deterministic)[0] for deterministic in (False, True))
    np.testing.assert_array_equal(first, second)
    assert model.action_noise._sigma.tolist() == [0.1, 0.1]
    model.actor.sample = lambda obs, noise, average=False: th.full((len(obs), 2), 0.1)
    noise = model._next_actions(th.zeros(2000, 10)) - 0.1
    assert 0.49 < noise.abs().max() < 0.5001 and 0.19 < noise.std() < 0.21


@pytest.mark.parametrize("cls", [SACActor, TD3Actor])
def test_gaussian_actors_climb(cls):
    model = gaussian(cls, learning_rate=1e-2).learn(12)
    model._value = lambda critic, obs, actions: 10 * actions.sum(dim=1, keepdim=True)
    model.train(gradient_steps=150, batch_size=8)
    assert (model.predict(np.zeros((5, 10), np.float32), deterministic=True)[0] > 0.8).all()

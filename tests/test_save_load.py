"""What is saved is what comes back, and goes on learning."""

import copy
import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv

import sb3_qsm
from sb3_qsm import QSM, MlpPolicy
from sb3_qsm.policies import DiffusionActor

CHOICES = dict(
    net_arch=dict(pi=[16], qf=[8]),
    n_diffusion_steps=3,
    noise_schedule="cosine",
    sampler="ddim",
    preconditioning="noise",
    denoiser_class="mlp",
    denoiser_kwargs=dict(activation_fn=th.nn.Mish, time_dim=8, time_net_arch=(8,)),
    layer_norm=False,
    n_critics=3,
)
SMALL = dict(learning_starts=10, batch_size=8, buffer_size=200, seed=0, device="cpu")


@pytest.fixture(scope="module")
def model():
    """A model far from its initialisation, the temperature included."""
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=CHOICES, ent_coef="auto_0.5", learning_rate=1e-2, **SMALL)
    return model.learn(40)


def observations(model, n=5):
    return np.stack([model.observation_space.sample() for _ in range(n)])


def predictions(predictor, observations):
    """One deterministic and one random prediction, the latter from a fixed seed."""
    th.manual_seed(0)
    return [predictor.predict(observations, deterministic=deterministic)[0] for deterministic in (True, False)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_state(first, second):
    """Equality of nested dictionaries and lists of tensors."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_state(a, b)
    elif isinstance(first, th.Tensor):
        assert th.equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize("kind", [str, pathlib.Path, io.BytesIO])
def test_save_load(model, tmp_path, kind):
    path = io.BytesIO() if kind is io.BytesIO else kind(tmp_path / "model.zip")
    model.save(path)
    if kind is io.BytesIO:
        path.seek(0)
    loaded = QSM.load(path, env=model.get_env(), device="cpu")
    obs = observations(model)
    assert_same(predictions(model, obs), predictions(loaded, obs))
    # Weights, both networks' optimizers, temperature
    assert_same_state(model.get_parameters(), loaded.get_parameters())
    assert loaded.policy.actor_kwargs == model.policy.actor_kwargs
    assert loaded._n_updates == 30 and loaded.num_timesteps == 40
    before = loaded.get_parameters()["actor.optimizer"]["state"][0]["step"].item()
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60 and loaded._n_updates > 30
    assert loaded.get_parameters()["actor.optimizer"]["state"][0]["step"].item() == before + (loaded._n_updates - 30) // 2


def test_loaded_model_learns_alike(model, tmp_path):
    """The loaded model and the one in memory take the same next update, temperature included."""
    model.save(tmp_path / "model")
    twins = [QSM.load(tmp_path / "model", env=model.get_env(), device="cpu") for _ in range(2)]
    twins[1].set_parameters(copy.deepcopy(twins[0].get_parameters()))
    reference = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=CHOICES, ent_coef="auto_0.5", learning_rate=1e-2, **SMALL)
    # A copy, since torch's optimizers adopt the tensors that they are given
    reference.set_parameters(copy.deepcopy(model.get_parameters()))
    for twin in [*twins, reference]:
        twin.replay_buffer = model.replay_buffer
        twin._n_updates = model._n_updates
        twin.set_logger(model.logger)
        np.random.seed(1)
        th.manual_seed(1)
        twin.train(gradient_steps=3, batch_size=8)
    for twin in [twins[1], reference]:
        assert_same_state(twins[0].get_parameters(), twin.get_parameters())


def test_temperature_survives(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", device="cpu")
    assert model.temperature.value().item() != pytest.approx(0.5, rel=1e-3)
    assert th.equal(loaded.temperature.value(), model.temperature.value())
    loaded.temperature.update(th.tensor(1e6))
    assert loaded.temperature.value() < model.temperature.value()


@pytest.mark.parametrize("ent_coef", [0.3, "auto_0.3"])
def test_temperature_given_to_load(ent_coef, tmp_path):
    """A number is what the argument says; a temperature that is learnt goes on from the file's."""
    QSM("MlpPolicy", "Pendulum-v1", ent_coef=ent_coef, **SMALL).save(tmp_path / "model")
    for kwargs, value in [(dict(), 0.3), (dict(ent_coef=0.1), 0.1), (dict(ent_coef="auto"), 0.3)]:
        loaded = QSM.load(tmp_path / "model", device="cpu", **kwargs)
        assert loaded.temperature.value().item() == pytest.approx(value)


def test_set_parameters(model):
    other = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=CHOICES, **SMALL | dict(seed=1))
    obs = observations(model)
    with pytest.raises(AssertionError):
        assert_same_state(model.get_parameters(), other.get_parameters())
    other.set_parameters(copy.deepcopy(model.get_parameters()))
    assert_same(predictions(model, obs), predictions(other, obs))
    assert_same_state(model.get_parameters(), other.get_parameters())
    with pytest.raises(ValueError, match="nonsense"):
        other.set_parameters({"nonsense": {}}, exact_match=False)


def test_policy_alone(model, tmp_path):
    model.policy.save(tmp_path / "policy.pkl")
    loaded = MlpPolicy.load(tmp_path / "policy.pkl", device="cpu")
    obs = observations(model)
    assert_same(predictions(model, obs), predictions(loaded, obs))
    assert_same_state(model.policy.state_dict(), loaded.state_dict())


def test_actor_alone(model, tmp_path):
    model.policy.actor.save(tmp_path / "actor.pkl")
    loaded = DiffusionActor.load(tmp_path / "actor.pkl", device="cpu")
    obs = observations(model)
    assert_same(predictions(model, obs), predictions(loaded, obs))


@pytest.mark.parametrize(
    "policy, env",
    [
        ("CnnPolicy", FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)),
        ("MultiInputPolicy", SimpleMultiObsEnv(discrete_actions=False, channel_last=False)),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_other_policies(policy, env, share, tmp_path):
    size = dict(features_dim=16) if policy == "CnnPolicy" else dict(cnn_output_dim=16)
    kwargs = dict(net_arch=[16], features_extractor_kwargs=size, share_features_extractor=share)
    model = QSM(policy, env, policy_kwargs=kwargs, **SMALL).learn(15)
    obs = model.observation_space.sample()
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    expected = predictions(model, obs)
    assert_same(expected, predictions(QSM.load(tmp_path / "model", device="cpu"), obs))
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert_same(expected, predictions(loaded, obs))
    assert (loaded.actor.features_extractor is loaded.critic.features_extractor) == share


def test_replay_buffer(model, tmp_path):
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=CHOICES, **SMALL)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    np.testing.assert_array_equal(loaded.replay_buffer.actions, model.replay_buffer.actions)


def test_file_is_small_and_readable(model, tmp_path):
    """No schedule, no network twice, nothing that only pickle can read but classes and functions."""
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = set(archive.namelist())
        data = json.loads(archive.read("data"))
    parts = ("policy", "actor.optimizer", "critic.optimizer", "temperature", "reward_scale")
    assert {f"{name}.pth" for name in parts} <= names
    assert not {"actor", "critic", "critic_target", "temperature", "reward_scale", "_score_target"} & set(data)
    assert data["ent_coef"] == "auto_0.5" and data["score_target"] == "box"


def test_no_float64_and_no_schedule_in_the_weights(model):
    assert {value.dtype for value in model.policy.state_dict().values()} == {th.float32}
    assert {value.dtype for value in [*model.policy.parameters(), *model.policy.buffers()]} == {th.float32}
    assert {value.dtype for value in model.temperature.state_dict().values()} == {th.float32}
    assert not [name for name in model.policy.state_dict() if "ratios" in name or "levels" in name]


def answers(model, observations):
    return model.predict(observations, deterministic=True)[0]


def test_weights_given_to_the_actor_are_kept():
    """As one transfers or clones a policy with SAC: state dict into ``model.actor``, then training goes on from it."""
    obs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    kwargs = dict(policy_kwargs=dict(net_arch=[16]), **SMALL | dict(learning_starts=0))
    teacher = QSM("MlpPolicy", "Pendulum-v1", **kwargs | dict(seed=1)).learn(20)
    student = QSM("MlpPolicy", "Pendulum-v1", learning_rate=1e-6, **kwargs | dict(seed=2)).learn(4)
    distance = np.abs(answers(student, obs) - answers(teacher, obs)).mean()
    student.actor.load_state_dict(teacher.actor.state_dict())
    np.testing.assert_array_equal(answers(student, obs), answers(teacher, obs))
    student.learn(10)
    assert np.abs(answers(student, obs) - answers(teacher, obs)).mean() < 0.1 * distance


def test_cloned_behaviour_answers_and_goes_on():
    """Weights trained from outside are those that act, deterministic or not, until a running mean has begun."""
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[16]), **SMALL)
    optimizer = th.optim.Adam(model.actor.parameters(), lr=0.01)
    for _ in range(100):
        obs, actions = th.randn(64, 3), th.full((64, 1), 0.75)
        t = th.randint(6, (64,))
        noisy = actions + model.actor.ratios[t, None] * th.randn_like(actions)
        loss = ((model.actor.denoise(obs, noisy, t)[0] - actions) ** 2).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    obs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    assert np.abs(answers(model, obs) - 2 * 0.75).mean() < 0.1
    model.lr_schedule = lambda _: 1e-6
    model.learn(20)
    assert model.actor.has_average() and np.abs(answers(model, obs) - 2 * 0.75).mean() < 0.1


def test_running_mean_goes_into_a_new_model():
    """It does not begin anew: one update of the actor moves it as little as it would have in the old model."""
    kwargs = dict(policy_kwargs=dict(net_arch=[16]), **SMALL | dict(learning_starts=0))
    old = QSM("MlpPolicy", "Pendulum-v1", learning_rate=3e-3, **kwargs).learn(300)
    new = QSM("MlpPolicy", "Pendulum-v1", learning_rate=0.0, **kwargs)
    new.set_parameters(copy.deepcopy(old.get_parameters()))
    vector = lambda module: th.nn.utils.parameters_to_vector(module.parameters()).clone()  # noqa: E731
    mean, weights = vector(new.actor.average["denoiser"]), vector(new.actor.denoiser)
    new.learn(2)
    moved = (vector(new.actor.average["denoiser"]) - mean).norm() / (weights - mean).norm()
    assert moved.item() == pytest.approx(9 / 160, rel=1e-3)


def test_file_says_which_version_wrote_it(model, tmp_path):
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert json.loads(file.read("data"))["sb3_qsm_version"] == sb3_qsm.__version__
    assert QSM.load(tmp_path / "model").sb3_qsm_version == sb3_qsm.__version__

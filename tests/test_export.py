"""An exported policy acts as it did."""

import json
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from safetensors import safe_open
from safetensors.torch import load, save_file
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qsm import QSM, MlpPolicy
from sb3_qsm.export import _random_inputs, export_onnx, exported_policy, load_policy, save_policy

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = dict(batch_size=8, learning_starts=10, buffer_size=200, seed=0, device="cpu")


@pytest.fixture(scope="module")
def model():
    """Observations normalised, actions in [-2, 2], and one argument that is a tuple."""
    kwargs = dict(
        net_arch=[16], n_diffusion_steps=3, denoiser_class="mlp", denoiser_kwargs=dict(time_dim=8, time_net_arch=(8,))
    )
    env = VecNormalize(make_vec_env("Pendulum-v1"), clip_obs=2.0)
    return QSM("MlpPolicy", env, policy_kwargs=kwargs, **SMALL).learn(30)


@pytest.fixture(scope="module")
def observations():
    """Raw ones, some of them far enough from the mean to be clipped."""
    return np.random.default_rng(1).normal(size=(1000, 3), scale=[1, 1, 30]).astype(np.float32)


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx_deterministic(model, observations, tmp_path):
    state = th.get_rng_state()
    export_onnx(model, tmp_path / "policy.onnx")
    assert th.equal(th.get_rng_state(), state)
    normalized = model.get_vec_normalize_env().normalize_obs(observations)
    assert (np.abs(normalized) == 2.0).any()
    expected, _ = model.predict(normalized, deterministic=True)
    assert expected.std() > 0.01
    onnx = session(tmp_path / "policy.onnx")
    assert [(i.name, i.type) for i in onnx.get_inputs()] == [("observation", "tensor(float)")]
    for n in [1, 7, 1000]:
        (found,) = onnx.run(["action"], {"observation": observations[:n]})
        np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]


def test_onnx_sampled(model, observations, tmp_path):
    export_onnx(model, tmp_path / "policy.onnx", deterministic=False)
    noise = np.random.default_rng(2).normal(size=(4, 1000, 1)).astype(np.float32)
    normalized = th.as_tensor(model.get_vec_normalize_env().normalize_obs(observations))
    with th.no_grad():
        expected = model.policy.unscale_action(model.actor.sample(normalized, th.as_tensor(noise)).numpy())
    onnx = session(tmp_path / "policy.onnx")
    for n in [1, 1000]:
        (found,) = onnx.run(["action"], {"observation": observations[:n], "noise": noise[:, :n]})
        np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-5)


@pytest.mark.expensive
@pytest.mark.parametrize("deterministic", [True, False])
def test_onnx_dictionaries_and_images(tmp_path, deterministic):
    env = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
    policy_kwargs = dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))
    model = QSM("MultiInputPolicy", env, policy_kwargs=policy_kwargs, **SMALL).learn(15)
    export_onnx(model, tmp_path / "policy.onnx", deterministic)  # compares by itself
    names = {i.name for i in session(tmp_path / "policy.onnx").get_inputs()}
    assert names == set(env.observation_space.spaces) | (set() if deterministic else {"noise"})


@pytest.mark.expensive
def test_graph_that_differs_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_qsm.export.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"the ONNX graph must be within -1.0 of PyTorch, it differs by .*: not written"):
        export_onnx(model, tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_policy_file(model, observations, tmp_path):
    save_policy(model, tmp_path / "policy.safetensors")
    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    policy = load_policy(tmp_path / "policy.safetensors")
    assert found == []
    normalized = model.get_vec_normalize_env().normalize_obs(observations)
    expected, _ = model.predict(normalized, deterministic=True)
    np.testing.assert_array_equal(policy.predict(observations, deterministic=True), expected)
    th.manual_seed(0)
    first = policy.predict(observations)
    th.manual_seed(0)
    np.testing.assert_array_equal(first, exported_policy(model).predict(observations))
    assert first.std() > 0.01 and np.abs(first - expected).max() > 0.01
    kept, loaded = model.actor.state_dict(), policy.actor.state_dict()
    tensors = load((tmp_path / "policy.safetensors").read_bytes())
    saved = {name.removeprefix("actor.") for name in tensors if name.startswith("actor.")}
    assert all(th.equal(loaded[name], kept[name]) for name in saved)
    # Actions come through the slow representation of states
    assert {name.split(".")[0] for name in kept.keys() - saved} == {"representation", "slow_representation"}
    assert {name.split(".")[1] for name in saved if name.startswith("slow_representation")} == {"norm", "state_net"}
    np.testing.assert_allclose(policy.predict(observations[0], deterministic=True), expected[0], rtol=1e-4)


def test_policy_file_of_dictionaries(tmp_path):
    env = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
    policy_kwargs = dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))
    model = QSM("MultiInputPolicy", env, policy_kwargs=policy_kwargs, **SMALL)
    save_policy(model, tmp_path / "policy.safetensors")
    obs = {key: value[None] for key, value in env.observation_space.sample().items()}
    expected, _ = model.predict(obs, deterministic=True)
    found = load_policy(tmp_path / "policy.safetensors").predict(obs, deterministic=True)
    np.testing.assert_array_equal(found, expected)


class Parts(gym.Env):
    """Keys that are not in the order of the alphabet, all of one size; one has the name of what a policy returns."""

    observation_space = gym.spaces.Dict([(key, gym.spaces.Box(100, 200, (2,))) for key in ("speed", "action", "place")])
    action_space = gym.spaces.Box(-1, 1, (2,))


def test_order_of_the_keys(tmp_path):
    model = QSM("MultiInputPolicy", Parts(), policy_kwargs=dict(net_arch=[8]), **SMALL)
    save_policy(model, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.keys == ["speed", "action", "place"] and policy.action_space == Parts.action_space
    obs = {key: value[None] for key, value in Parts.observation_space.sample().items()}
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True), model.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match=r"keys must differ from 'action' and 'noise' in an ONNX graph, got \['action'\]"):
        export_onnx(model, tmp_path / "policy.onnx")


@pytest.mark.parametrize(
    "box, low, high",
    [
        (gym.spaces.Box(100, 200, (500,)), 100, 120),
        (gym.spaces.Box(-np.inf, -100, (500,)), -120, -100),
        (gym.spaces.Box(-np.inf, np.inf, (500,)), -10, 10),
        (gym.spaces.Box(-3e38, 3e38, (500,)), -10, 10),
        (gym.spaces.Box(0, 255, (500,), np.uint8), 0, 255),
    ],
)
def test_observations_to_compare_with_are_in_the_box(box, low, high, model):
    exported = exported_policy(model)
    exported.space = box
    noise, values = _random_inputs(exported, n=2)
    assert noise.shape == (4, 2, 1) and values.shape == (2, 500) and box.contains(values[0].numpy())
    assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high


def test_model_without_its_normalisation(model, tmp_path):
    """The statistics are not in SB3's file: a policy without them would answer, and wrongly, whatever else is given."""
    model.save(tmp_path / "model")
    for env in (None, make_vec_env("Pendulum-v1"), VecNormalize(make_vec_env("Pendulum-v1"), norm_obs=False)):
        for write in (save_policy, export_onnx):
            with pytest.raises(ValueError, match=r"env must be the VecNormalize of the training, .*: give it to QSM.load"):
                write(QSM.load(tmp_path / "model", env=env, device="cpu"), tmp_path / "policy")
    save_policy(QSM.load(tmp_path / "model", env=model.env, device="cpu"), tmp_path / "policy")


@pytest.mark.parametrize("env", [None, "Pendulum-v1"])
@pytest.mark.parametrize("norm_reward", [False, True])
def test_model_whose_observations_were_never_normalised(env, norm_reward, tmp_path):
    vec_env = make_vec_env("Pendulum-v1")
    trained_on = VecNormalize(vec_env, norm_obs=False) if norm_reward else vec_env
    model = QSM("MlpPolicy", trained_on, policy_kwargs=dict(net_arch=[8]), **SMALL).learn(12)
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", env=env and make_vec_env(env), device="cpu")
    save_policy(loaded, tmp_path / "policy")
    obs = np.ones((2, 3), np.float32)
    found = load_policy(tmp_path / "policy").predict(obs, deterministic=True)
    np.testing.assert_array_equal(found, model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("channel_last", [False, True])
def test_images_and_a_shared_features_extractor(channel_last, tmp_path):
    """The weights that actor and critics share are written once; images may come in either order of axes, as for predict."""
    env = FakeImageEnv(screen_height=36, screen_width=40, n_channels=1, discrete=False, channel_first=not channel_last)
    kwargs = dict(share_features_extractor=True, net_arch=[8], features_extractor_kwargs=dict(features_dim=8))
    model = QSM("CnnPolicy", env, policy_kwargs=kwargs, **SMALL | dict(buffer_size=50)).learn(12)
    save_policy(model, tmp_path / "policy")
    obs = np.stack([env.observation_space.sample()] * 2)
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(load_policy(tmp_path / "policy").predict(obs, deterministic=True), expected)


class OwnPolicy(MlpPolicy):
    pass


def test_policy_of_ones_own(tmp_path):
    model = QSM(OwnPolicy, "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), **SMALL)
    with pytest.raises(ValueError, match=r"policy must be one of .*'DiffusionPolicy'.*, got OwnPolicy"):
        save_policy(model, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_policy_with_a_class_among_its_arguments(tmp_path):
    policy_kwargs = dict(net_arch=[8], activation_fn=th.nn.ReLU)
    save_policy(QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **SMALL), tmp_path / "policy")
    with pytest.raises(ValueError, match="policy_kwargs must be given again"):
        load_policy(tmp_path / "policy")
    load_policy(tmp_path / "policy", policy_kwargs)


def test_policy_files_that_are_refused(model, tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(model, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sb3_qsm"])
    content = path.read_bytes()
    tensors = load(content)
    broken = {
        "truncated": lambda: path.write_bytes(content[:-1]),
        "another file": lambda: path.write_bytes(b"no safetensors"),
        "no header": lambda: save_file(tensors, path),
        "format 2": lambda: save_file(tensors, path, {"sb3_qsm": json.dumps(header | {"format": 2})}),
        "no keys": lambda: save_file(tensors, path, {"sb3_qsm": json.dumps(header | {"keys": ["position"]})}),
        "another class": lambda: save_file(tensors, path, {"sb3_qsm": json.dumps(header | {"policy_class": "os.system"})}),
    }
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        broken[f"without {name}"] = partial(save_file, rest, path, {"sb3_qsm": json.dumps(header)})
    for what, write in broken.items():
        write()
        with pytest.raises(ValueError, match=r"policy.safetensors refused: " + ("format 2" if what == "format 2" else "")):
            load_policy(path)


def test_spaces_that_are_not_boxes(tmp_path):
    class DiscreteObservations(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 0, 0.0, False, False, {}

    model = QSM("MlpPolicy", DiscreteObservations(), policy_kwargs=dict(net_arch=[8]), **SMALL)
    for write in (save_policy, export_onnx):
        with pytest.raises(ValueError, match="observation_space must be a box or a dictionary of boxes, got Discrete"):
            write(model, tmp_path / "policy")
    assert not list(tmp_path.iterdir())

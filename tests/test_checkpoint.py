"""A run that was stopped and resumed is the run that was not; a checkpoint that is not whole is not used."""

import json
import multiprocessing
import random
import resource
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from benchmarks import kill_test
from sb3_qsm import QSM
from sb3_qsm.checkpoint import CheckpointCallback, restore_buffer
from sb3_qsm.storage import checkpoints, newest_checkpoint, read_checkpoint

SMALL = dict(policy_kwargs=dict(net_arch=[8]), batch_size=8, learning_starts=10, buffer_size=200, seed=0, device="cpu")


class Rows(KVWriter):
    """What was logged, without the clock."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({key: repr(value) for key, value in key_values.items() if key not in kill_test.WALL_CLOCK})

    def close(self):
        pass


class OpaqueEnv(gym.Env):
    """A simulator in the hands of something that cannot be looked into."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.simulator = (i for i in range(10**9))

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.full(2, np.sin(next(self.simulator)), np.float32), 1.0, False, False, {}


def make_env(task="Pendulum-v1", n_envs=1, normalize=False, **kwargs):
    env = make_vec_env(task, n_envs=n_envs, env_kwargs=kwargs or None)
    return VecNormalize(env) if normalize else env


def learn(model, total, *callbacks):
    """Train to ``total``; returns all that must be equal."""
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(total - model.num_timesteps, list(callbacks), log_interval=1, reset_num_timesteps=False)
    return kill_test.digest(model), rows.rows


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with two checkpoints of a tiny run: at 40 and at 60 steps."""
    folder = tmp_path_factory.mktemp("run")
    model = QSM("MlpPolicy", make_env(), **SMALL)
    model.learn(65, CheckpointCallback(20, folder))
    assert [path.name for path in checkpoints(folder)] == ["rl_model_60_steps", "rl_model_40_steps"]
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(saved, tmp_path / "run")


CASES = {
    "one": (dict(task="InvertedPendulum-v5"), {}, None),
    "several, normalised, noise with a memory": (
        dict(task="InvertedPendulum-v5", n_envs=3, normalize=True),
        {},
        lambda: OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1)),
    ),
    # Rewards that use positions and forces which lag behind the state that MuJoCo integrates
    "ant": (dict(task="Ant-v5", n_envs=2), {}, None),
    # The ring of the replay buffer is written over
    "n-step returns, small buffer": (dict(), dict(n_steps=3, buffer_size=70, gradient_steps=2, train_freq=3), None),
    "published, a schedule for the learning rate": (
        dict(normalize=True),
        dict(score_target="published", ent_coef=0.1, learning_rate=lambda progress: 1e-3 * progress),
        None,
    ),
    "episodes": (dict(task="InvertedPendulum-v5"), dict(train_freq=(1, "episode"), gradient_steps=-1), None),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case, tmp_path):
    env_kwargs, kwargs, noise = CASES[case]
    make = lambda: make_env(**env_kwargs)  # noqa: E731
    again = {} if noise is None else dict(action_noise=noise())
    model = QSM("MlpPolicy", make(), **SMALL | kwargs | again)
    expected, rows = learn(model, 120, CheckpointCallback(17 // model.n_envs, tmp_path / "a", keep=100))
    paths = checkpoints(tmp_path / "a")
    assert len(paths) >= 3
    for path in [paths[1], paths[-1]]:
        random.seed(5), np.random.seed(5), th.manual_seed(5)  # what another process would have
        again = {} if noise is None else dict(action_noise=noise())
        again |= {name: value for name, value in kwargs.items() if callable(value)}
        model = QSM.resume(path, make(), **again)
        assert 0 < model.num_timesteps < 120
        found, later_rows = learn(model, 120, CheckpointCallback(17 // model.n_envs, tmp_path / f"b{path.name}"))
        assert found == expected
        assert rows[len(rows) - len(later_rows) :] == later_rows


def test_resume_dictionary_observations(tmp_path):
    make = lambda: SimpleMultiObsEnv(discrete_actions=False, channel_last=False)  # noqa: E731
    size = dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))
    model = QSM("MultiInputPolicy", make(), **SMALL | dict(policy_kwargs=size, buffer_size=60))
    expected = learn(model, 40, CheckpointCallback(15, tmp_path))
    found = learn(QSM.resume(tmp_path, make()), 40)
    assert found[0] == expected[0]


def test_resume_needs_the_buffer_class_of_the_user(tmp_path):
    """Without it the default would take over, with returns of three steps."""
    model = QSM("MlpPolicy", make_env(), replay_buffer_class=ReplayBuffer, **SMALL)
    expected = learn(model, 40, CheckpointCallback(15, tmp_path))
    with pytest.raises(ValueError, match=r"resume needs these arguments again.*: replay_buffer_class"):
        QSM.resume(tmp_path, make_env())
    found = learn(QSM.resume(tmp_path, make_env(), replay_buffer_class=ReplayBuffer), 40)
    assert found[0] == expected[0]


def test_callbacks_go_on(tmp_path):
    """Their counts and results come back, and the environment of the evaluation; not what their constructors set."""

    def callbacks(folder, deterministic=True):
        env = make_vec_env("Pendulum-v1", seed=3)
        return EvalCallback(env, eval_freq=15, n_eval_episodes=1, deterministic=deterministic, verbose=0), CheckpointCallback(
            20, folder
        )

    unbroken, checkpoint = callbacks(tmp_path / "a")
    learn(QSM("MlpPolicy", make_env(), **SMALL), 70, unbroken, checkpoint)
    resumed, checkpoint = callbacks(tmp_path / "b")
    learn(QSM.resume(tmp_path / "a" / "rl_model_40_steps", make_env()), 70, resumed, checkpoint)
    assert resumed.evaluations_results == [] == unbroken.evaluations_results  # no log_path
    assert (resumed.n_calls, resumed.best_mean_reward) == (70, unbroken.best_mean_reward)
    assert resumed.last_mean_reward == unbroken.last_mean_reward
    other, _ = callbacks(tmp_path / "c", deterministic=False)
    with pytest.warns(UserWarning, match="callbacks that are not there: CheckpointCallback_0"):
        learn(QSM.resume(tmp_path / "a" / "rl_model_40_steps", make_env()), 41, other)
    assert other.deterministic is False and other.n_calls == 41


def test_killed_run_is_the_unbroken_run(tmp_path):
    """Real processes, killed with SIGKILL at random moments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.kill_test"])
    case = ("InvertedPendulum-v5", 700, 2, True, 10)  # long enough that a fast machine has not ended it before the last kill
    went_on, different = kill_test.compare(context, tmp_path, 3, 0, case, 0.25)
    assert len(went_on) == 3 and different == []


def test_checkpoint_costs_the_new_transitions(tmp_path):
    model = QSM("MlpPolicy", make_env(n_envs=2), **SMALL | dict(buffer_size=100))
    written = []

    class Watch(CheckpointCallback):
        def save(self):
            before = set((self.folder / "replay_buffer").iterdir())
            path = super().save()
            after = set((self.folder / "replay_buffer").iterdir())
            written.append((len(after - before), sum(shard["rows"] for shard in self.shards)))
            return path

    model.learn(180, Watch(10, tmp_path))
    # One new file of 10 rows each time, up to the 50 rows of the ring; then the oldest files go
    assert written == [(1, 10), (1, 20), (1, 30), (1, 40), (1, 50), (1, 50), (1, 50), (1, 50)]
    assert len(list((tmp_path / "replay_buffer").iterdir())) == 6  # those of the two checkpoints kept
    assert len(checkpoints(tmp_path)) == 2
    state = newest_checkpoint(tmp_path).state["replay_buffer"]
    model = QSM("MlpPolicy", make_env(n_envs=2), **SMALL | dict(buffer_size=100))
    restore_buffer(model.replay_buffer, state, tmp_path)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (80 % 50, True)


def test_nothing_is_unpickled(saved):
    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    QSM.resume(saved, make_env())
    assert found == []


def same(checkpoint, other):
    return (
        checkpoint.state == other.state
        and checkpoint.arrays.keys() == other.arrays.keys()
        and all(checkpoint.arrays[name].tobytes() == other.arrays[name].tobytes() for name in other.arrays)
    )


def edit_json(content, rng):
    """Change, add or remove one thing in a JSON file; the result is valid JSON."""
    data = json.loads(content)
    parents = []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            parents.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(data)
    parent, key = rng.choice(parents)
    change = rng.randrange(4)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif change == 2:
        parent[key] = rng.choice([None, -1, 1e99, "", [], {}, True, "../../x", {"kind": "object"}, [[[]]]])
    else:
        parent[key] = [parent[key]]
    return json.dumps(data).encode()


def mutate(folder, rng):
    """Break one file of the newest checkpoint or of the transitions that it uses; returns what was done."""
    path = rng.choice(sorted([*checkpoints(folder)[0].iterdir(), *(folder / "replay_buffer").iterdir()]))
    content = path.read_bytes()
    kind = rng.choice(["truncate", "flip", "delete", "swap", "extend", "zeros", "edit"])
    if kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flip":
        i = rng.randrange(len(content))
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :])
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = rng.choice(sorted(checkpoints(folder)[1].iterdir()))
        path.write_bytes(other.read_bytes())
    elif kind == "extend":
        path.write_bytes(content + rng.randbytes(rng.randrange(1, 100)))
    elif kind == "zeros":
        i = rng.randrange(len(content))
        path.write_bytes(content[:i] + bytes(min(512, len(content) - i)) + content[i + 512 :])
    else:
        path = checkpoints(folder)[0] / rng.choice(["state.json", "manifest.json"])
        path.write_bytes(edit_json(path.read_bytes(), rng))
    return f"{kind} {path.name}"


def test_fuzz(saved, tmp_path):
    """Each of 300 broken checkpoints is refused, or what is read is what was written."""
    rng = random.Random(0)
    good = newest_checkpoint(saved)
    identical = []
    for i in range(300):
        folder = shutil.copytree(saved, tmp_path / str(i))
        what = mutate(folder, rng)
        try:
            checkpoint = read_checkpoint(folder / good.path.name)
        except ValueError as error:
            assert "refused" in str(error)
        else:
            assert same(checkpoint, good), what
            identical.append(what)
        shutil.rmtree(folder)
    assert len(identical) < 30, identical  # such as a shard of the older checkpoint that the newer does not use


def test_all_bytes_of_the_manifest(folder):
    """No single byte of the manifest can be changed and another state be read."""
    path = checkpoints(folder)[0]
    good = read_checkpoint(path)
    content = (path / "manifest.json").read_bytes()
    for i in range(len(content)):
        (path / "manifest.json").write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            assert same(read_checkpoint(path), good)
        except ValueError as error:
            assert "refused" in str(error)


def test_broken_checkpoint_gives_way_to_the_one_before(folder):
    path = folder / "rl_model_60_steps" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"(?s)rl_model_60_steps refused: state.safetensors.*before: .*rl_model_40_steps"):
        assert QSM.resume(folder, make_env()).num_timesteps == 40
    with pytest.raises(ValueError, match=r"rl_model_60_steps refused: state.safetensors is not as it was written"):
        QSM.resume(folder / "rl_model_60_steps", make_env())
    shutil.rmtree(folder / "replay_buffer")
    with pytest.raises(ValueError, match=r"(?s)no whole checkpoint.*rl_model_60_steps refused.*rl_model_40_steps refused"):
        QSM.resume(folder, make_env())
    with pytest.raises(ValueError, match="no whole checkpoint"):
        QSM.resume(folder / "nowhere", make_env())


def test_the_run_goes_on_over_a_broken_checkpoint(folder, tmp_path):
    expected, _ = learn(QSM("MlpPolicy", make_env(), **SMALL), 90)
    (folder / "rl_model_60_steps" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="rl_model_60_steps refused"):
        model = QSM.resume(folder, make_env())
    assert learn(model, 90, CheckpointCallback(20, folder))[0] == expected
    assert [path.name for path in checkpoints(folder)] == ["rl_model_80_steps", "rl_model_60_steps"]
    assert read_checkpoint(folder / "rl_model_60_steps").state["num_timesteps"] == 60


def test_other_format(folder):
    path = folder / "rl_model_60_steps" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2, this version reads format 1"):
        QSM.resume(folder / "rl_model_60_steps", make_env())


def test_other_versions(folder, monkeypatch):
    monkeypatch.setattr("sb3_qsm.checkpoint.package_versions", lambda: {"torch": "0.1"})
    with pytest.warns(UserWarning, match=r"perhaps not bit for bit: .*torch .* -> 0.1"):
        QSM.resume(folder, make_env())


@pytest.mark.parametrize(
    "env, name",
    [
        (lambda: make_env("InvertedPendulum-v5"), "id"),
        (lambda: make_env(g=9.0), "kwargs"),
        (lambda: make_env(n_envs=2), "n_envs"),
        (lambda: make_env(normalize=True), "layers"),
        (lambda: DummyVecEnv([lambda: gym.make("Pendulum-v1")]), "layers"),
    ],
)
def test_other_environment(saved, env, name):
    with pytest.raises(ValueError, match=f"^{name} must be that of the checkpoint .*rl_model_60_steps"):
        QSM.resume(saved, env())


def test_other_arguments(saved, tmp_path):
    with pytest.raises(ValueError, match=r"gamma must be that of the checkpoint .* 0.99, got 0.9: .* QSM.load"):
        QSM.resume(saved, make_env(), gamma=0.9)
    assert QSM.resume(saved, make_env(), verbose=1, seed=7).verbose == 1
    kwargs = dict(policy_kwargs=dict(net_arch=[8], activation_fn=th.nn.ReLU))
    kwargs["action_noise"] = NormalActionNoise(np.zeros(1), np.ones(1))
    QSM("MlpPolicy", make_env(), **SMALL | kwargs).learn(12, CheckpointCallback(5, tmp_path))
    with pytest.raises(ValueError, match=r"needs these arguments again, .*: action_noise, policy_kwargs"):
        QSM.resume(tmp_path, make_env())
    assert QSM.resume(tmp_path, make_env(), **kwargs).policy.critic_kwargs["activation_fn"] is th.nn.ReLU


def test_learn_after_resume(saved):
    with pytest.raises(ValueError, match=r"reset_num_timesteps must be False after QSM.resume"):
        QSM.resume(saved, make_env()).learn(100)
    with pytest.warns(UserWarning, match="was to end at 65 steps, it will now end at 125; schedules follow"):
        QSM.resume(saved, make_env()).learn(65, reset_num_timesteps=False)


def test_folder_of_another_run(saved):
    before = sorted(path.name for path in saved.rglob("*"))
    with pytest.raises(ValueError, match=r"holds rl_model_60_steps, later than the model \(0 steps\)"):
        QSM("MlpPolicy", make_env(), **SMALL).learn(30, CheckpointCallback(10, saved))
    assert sorted(path.name for path in saved.rglob("*")) == before


def test_arguments_of_the_callback(tmp_path):
    for kwargs in [dict(save_freq=0), dict(save_freq=1.5), dict(save_freq=1, keep=0)]:
        name = "keep" if "keep" in kwargs else "save_freq"
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            CheckpointCallback(save_path=tmp_path, **kwargs)
    for prefix in [".hidden", "a/b"]:
        with pytest.raises(ValueError, match=f"name_prefix must be the start of a file name.*{prefix}"):
            CheckpointCallback(1, tmp_path, name_prefix=prefix)


def test_other_buffers(tmp_path):
    class OwnBuffer(ReplayBuffer):
        pass

    no_timeouts = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    for kwargs, name in [(dict(replay_buffer_class=OwnBuffer), "OwnBuffer"), (no_timeouts, "ReplayBuffer")]:
        with pytest.raises(ValueError, match=f"without optimize_memory_usage; got {name}"):
            QSM("MlpPolicy", make_env(), **SMALL | kwargs).learn(5, CheckpointCallback(1, tmp_path))


def test_broken_weights_are_not_written(folder):
    model = QSM.resume(folder, make_env())
    callback = CheckpointCallback(5, folder)
    before = newest_checkpoint(folder)
    with th.no_grad():
        next(model.critic_target.parameters()).view(-1)[0] = float("nan")
    model.tau = 0.0  # keep it there, unseen by the losses
    model.learning_starts = 10**6
    with pytest.raises(ValueError, match=r"(?s)parameters.policy.critic_target.* must be finite, .* after 6\d steps"):
        model.learn(30, callback, reset_num_timesteps=False)
    assert same(newest_checkpoint(folder), before)


def test_full_disk(tmp_path):
    """The system refuses to write more than so many bytes to a file, as it would on a full disk; the training goes on."""
    expected = learn(QSM("MlpPolicy", make_env(), **SMALL), 65)
    model = QSM("MlpPolicy", make_env(), **SMALL)

    class FullInBetween(CheckpointCallback):
        def save(self):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if 30 <= self.num_timesteps < 50:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                return super().save()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.warns(
        UserWarning, match="no checkpoint at 40 steps: .* Training goes on; the next attempt follows in 20 calls"
    ):
        found = learn(model, 65, FullInBetween(20, tmp_path))
    assert found == expected
    assert [path.name for path in checkpoints(tmp_path)] == ["rl_model_60_steps", "rl_model_20_steps"]
    assert not list(tmp_path.rglob("*tmp"))
    assert QSM.resume(tmp_path, make_env()).num_timesteps == 60


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        QSM("MlpPolicy", make_env(), **SMALL).learn(5, CheckpointCallback(1, tmp_path / "file" / "run"))


def dm_control():
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    return DummyVecEnv([lambda: gym.wrappers.FlattenObservation(gym.make("dm_control/cartpole-swingup-v0"))])


@pytest.mark.parametrize("make", [lambda: DummyVecEnv([OpaqueEnv]), lambda: SubprocVecEnv([OpaqueEnv]), dm_control])
def test_environment_without_a_state(make, tmp_path):
    """The run goes on with a new episode, and says so; returns over several steps do not reach across."""
    model = QSM("MlpPolicy", VecNormalize(make()), n_steps=3, **SMALL)
    model.learn(25, CheckpointCallback(10, tmp_path))
    with pytest.warns(UserWarning, match="(simulator|SubprocVecEnv|StepType).*new episode, not bit for bit"):
        resumed = QSM.resume(tmp_path, VecNormalize(make()))
    assert resumed.num_timesteps == 20
    assert resumed.get_vec_normalize_env().obs_rms.count > 20
    resumed.learn(10, CheckpointCallback(5, tmp_path), reset_num_timesteps=False)
    assert resumed.replay_buffer.timeouts[:20].ravel().tolist() == [0.0] * 19 + [1.0]
    state = newest_checkpoint(tmp_path).state["replay_buffer"]
    restore_buffer(model.replay_buffer, state, tmp_path)
    assert model.replay_buffer.timeouts[19, 0] == 1.0
    model.env.close(), resumed.env.close()

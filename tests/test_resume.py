"""A run that was stopped and started again is the run that was not; a checkpoint that is not whole is not used."""

import copy
import hashlib
import json
import random
import resource
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import DtypeObservation, TransformObservation, TransformReward
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import Figure, KVWriter, Logger
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.resume import ResumeCallback, checkpoints
from sb3_qsm.resume._storage import first_whole, read_checkpoint

WALL_CLOCK = ("time/fps", "time/time_elapsed")
SMALL = dict(policy_kwargs=dict(net_arch=[8]), batch_size=8, learning_starts=10, buffer_size=200, seed=0, device="cpu")


class Rows(KVWriter):
    """What was logged, without the clock."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({key: repr(value) for key, value in key_values.items() if key not in WALL_CLOCK})

    def close(self):
        pass


class StopAt(BaseCallback):
    """End the training as a kill would, before the transition of that step is stored."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def _on_step(self):
        return self.num_timesteps < self.step


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


def make_model(algorithm=SAC, env=None, **kwargs):
    kwargs = copy.deepcopy(SMALL) | kwargs  # SAC writes into policy_kwargs
    return algorithm(kwargs.pop("policy", "MlpPolicy"), make_env() if env is None else env, **kwargs)


def digest(model):
    """SHA-256 of parameters (targets, optimizers and temperature included), replay buffer and next random numbers."""

    def add(sha256, value):
        if isinstance(value, dict | list | tuple):
            for item in value.items() if isinstance(value, dict) else value:
                add(sha256, item)
        elif isinstance(value, th.Tensor | np.ndarray):
            sha256.update(np.ascontiguousarray(value).tobytes())
        else:
            sha256.update(repr(value).encode())

    def of(value):
        sha256 = hashlib.sha256()
        add(sha256, value)
        return sha256.hexdigest()

    variables = [getattr(model, name).detach() for name in model._get_torch_save_params()[1]]
    buffer = {name: value for name, value in vars(model.replay_buffer).items() if isinstance(value, np.ndarray | dict | int)}
    draws = [random.random(), np.random.random(), th.rand(1), model.action_space.sample()]
    return {"parameters": of([model.get_parameters(), variables]), "replay_buffer": of(buffer), "random": of(draws)}


def learn(model, total, *callbacks, **kwargs):
    """Train until ``total``; returns all that must be equal."""
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(total, list(callbacks), log_interval=1, **kwargs)
    return digest(model), rows.rows


def scramble():
    """Other random numbers, as another process has them."""
    random.seed(5), np.random.seed(5), th.manual_seed(5)


def without_newest(folder, tmp_path, n=1):
    """A copy of a folder, as it was some checkpoints earlier."""
    copied = shutil.copytree(folder, tmp_path / f"without_{n}")
    for path in checkpoints(copied)[:n]:
        shutil.rmtree(path)
    return copied


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with two checkpoints of a tiny run that was stopped: at 40 and at 60 steps."""
    folder = tmp_path_factory.mktemp("run")
    make_model(QSM).learn(90, [ResumeCallback(20, folder), StopAt(65)])
    assert [path.name for path in checkpoints(folder)] == ["rl_model_60_steps", "rl_model_40_steps"]
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(saved, tmp_path / "run")


CASES = {
    "SAC": (SAC, {}, {}),
    "SAC, fixed temperature, gSDE": (SAC, {}, dict(ent_coef=0.1, use_sde=True, sde_sample_freq=4)),
    "TD3, noise with a memory": (
        TD3,
        dict(n_envs=2),
        dict(action_noise=lambda: OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    ),
    "DQN": (DQN, dict(task="CartPole-v1"), dict(target_update_interval=30)),
    "QSM": (QSM, dict(task="InvertedPendulum-v5"), {}),
    "QSM, several, normalised, noise with a memory": (
        QSM,
        dict(task="InvertedPendulum-v5", n_envs=3, normalize=True),
        dict(action_noise=lambda: OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    ),
    # Rewards that use positions and forces which lag behind the state that MuJoCo integrates
    "Ant": (QSM, dict(task="Ant-v5", n_envs=2), {}),
    # The ring of the replay buffer is written over
    "n-step returns, small buffer": (QSM, {}, dict(n_steps=3, buffer_size=70, gradient_steps=2, train_freq=3)),
    "published, a schedule for the learning rate": (
        QSM,
        dict(normalize=True),
        dict(score_target="published", ent_coef=0.1, learning_rate=LinearSchedule(1e-3, 0.0, 1.0)),
    ),
    "episodes": (SAC, dict(task="InvertedPendulum-v5"), dict(train_freq=(1, "episode"), gradient_steps=-1)),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case, tmp_path):
    """The same program again, from the middle and from the end of the checkpoints: weights, buffer, logs, random numbers."""
    algorithm, env_kwargs, kwargs = CASES[case]

    def make():
        made = {name: value() if name == "action_noise" else value for name, value in kwargs.items()}
        return make_model(algorithm, make_env(**env_kwargs), **made)

    expected, rows = learn(make(), 120)
    save_freq = 17 // env_kwargs.get("n_envs", 1)
    assert learn(make(), 120, ResumeCallback(save_freq, tmp_path / "all", keep=100)) == (expected, rows)  # only watches
    paths = checkpoints(tmp_path / "all")
    assert len(paths) >= 4
    for n in (2, len(paths) - 1):
        folder = without_newest(tmp_path / "all", tmp_path, n)
        scramble()
        model = make()
        found, later_rows = learn(model, 120, ResumeCallback(save_freq, folder))
        assert found == expected
        assert rows[len(rows) - len(later_rows) :] == later_rows
        assert model._num_timesteps_at_start == int(paths[n].name.split("_")[2])


def test_dictionary_observations(tmp_path):
    def make(seed=0):
        np.random.seed(seed)  # of the environment's pictures, which it makes before it is given to a model
        env = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
        size = dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))
        return make_model(QSM, env, policy="MultiInputPolicy", policy_kwargs=size, buffer_size=60)

    expected, _ = learn(make(), 40)
    learn(make(), 40, ResumeCallback(15, tmp_path), StopAt(35))
    scramble()
    assert learn(make(seed=1), 40, ResumeCallback(15, tmp_path))[0] == expected


def test_complete_run_returns_at_once(tmp_path):
    expected, _ = learn(make_model(), 50, ResumeCallback(20, tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["rl_model_50_steps", "rl_model_40_steps"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    scramble()
    model = make_model(env=make_env())
    assert learn(model, 50, ResumeCallback(20, tmp_path), progress_bar=True) == (expected, [])
    assert model.num_timesteps == 50 and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.warns(UserWarning, match="was to end at 50 steps, it will now end at 70; schedules follow"):
        assert make_model().learn(70, ResumeCallback(20, tmp_path)).num_timesteps == 70


def test_run_that_a_callback_ends_at_its_last_step(tmp_path):
    """Its last transition is not stored: not a complete run, and no checkpoint."""
    make_model().learn(50, [ResumeCallback(20, tmp_path), StopAt(50)])
    assert [path.name for path in checkpoints(tmp_path)] == ["rl_model_40_steps", "rl_model_20_steps"]


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_learn_in_parts(reset_num_timesteps, tmp_path):
    """A model that goes on in its own process is not put back; one that begins again is not, either."""
    model, callback = make_model(), ResumeCallback(20, tmp_path)
    expected = learn(make_model(), 80)[0]
    scramble()
    model = make_model()
    model.learn(50, callback, reset_num_timesteps=reset_num_timesteps)
    assert learn(model, 30, callback, reset_num_timesteps=False)[0] == expected
    assert checkpoints(tmp_path)[0].name == "rl_model_80_steps"
    with pytest.raises(ValueError, match=r"holds rl_model_80_steps of an earlier call .* another save_path"):
        learn(model, 80, callback)


class Counts(BaseCallback):
    """Starts over with each training, as many callbacks do, and draws random numbers then."""

    def __init__(self):
        super().__init__()
        self.returns = []
        self.started_with = None

    def _on_training_start(self):
        self.started_with = len(self.returns)
        self.training_env.action_space.sample(), th.rand(3), np.random.random()

    def _on_step(self):
        self.returns += self.locals["rewards"].tolist()
        return True


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_go_on(first, tmp_path):
    """Their counts and results come back in either order, and the environment of an evaluation; not what constructors set."""

    def callbacks(name):
        env = make_vec_env("Pendulum-v1", seed=3)
        evaluation = EvalCallback(
            env, eval_freq=15, n_eval_episodes=1, log_path=tmp_path / name, deterministic=False, verbose=0
        )
        return [evaluation, Counts()]

    def run(name, stop, *others):
        resume = ResumeCallback(20, tmp_path / "saves")
        callbacks = [resume, *others] if first else [*others, resume]
        return learn(make_model(), 70, *callbacks, *([StopAt(stop)] if stop else []), progress_bar=True)

    unbroken, counts = callbacks("a")
    expected, rows = learn(make_model(), 70, unbroken, counts, progress_bar=True)
    run("b", 55, *callbacks("b"))
    scramble()
    resumed, resumed_counts = callbacks("c")
    with pytest.warns(UserWarning, match="callbacks that are not there: StopAt_0"):
        found, later_rows = run("c", None, resumed, resumed_counts)
    del expected["random"], found["random"]  # the progress bar draws some, by the clock
    assert found == expected and rows[-len(later_rows) :] == later_rows
    assert resumed.n_calls == counts.n_calls == 70
    assert resumed.best_mean_reward == unbroken.best_mean_reward
    for name in ("timesteps", "results"):
        evaluations = [np.load(tmp_path / folder / "evaluations.npz")[name] for folder in ("a", "c")]
        np.testing.assert_array_equal(*evaluations)
    assert resumed_counts.returns == counts.returns and len(counts.returns) == 70
    assert resumed_counts.started_with == (40 if first else 0)


def test_pictures_in_the_logger(tmp_path):
    """What waits in the logger and is no number is left out; the rest comes back."""

    class Record(BaseCallback):
        def _on_step(self):
            self.logger.record("figure", Figure(figure=object(), close=False))
            self.logger.record_mean("mean", self.num_timesteps)
            return True

    learn(make_model(), 90, ResumeCallback(20, tmp_path), Record(), StopAt(45))
    model = make_model()
    model._setup_learn(90, ResumeCallback(20, tmp_path))
    assert model.logger.name_to_value["mean"] == pytest.approx(20.5) and model.logger.name_to_count["mean"] == 40
    assert "figure" not in model.logger.name_to_value


def half(value):
    return value / 2


class Named(gym.Wrapper):
    """Keeps functions in a list."""

    def __init__(self, env, functions):
        super().__init__(env)
        self.functions = functions

    def step(self, action):
        obs, reward, *ends = self.env.step(action)
        return obs, self.functions[0](reward), *ends


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: TransformReward(env, half),
        lambda env: TransformReward(env, lambda reward: reward / 2),
        lambda env: TransformObservation(env, half, gym.spaces.Box(-8, 8, (3,))),
        lambda env: DtypeObservation(env, np.float16),
        lambda env: gym.wrappers.RescaleAction(env, -1.0, 1.0),
        lambda env: Named(env, [half, np.float32]),
    ],
)
def test_wrappers_with_functions(wrap, tmp_path, recwarn):
    """A function and no state: exact."""
    make = lambda: make_model(env=wrap(gym.make("Pendulum-v1")))  # noqa: E731
    expected = learn(make(), 45)
    learn(make(), 45, ResumeCallback(10, tmp_path), StopAt(35))
    scramble()
    assert learn(make(), 45, ResumeCallback(10, tmp_path))[0] == expected[0]
    assert [str(warning.message) for warning in recwarn if "bit for bit" in str(warning.message)] == []


def test_checkpoint_costs_the_new_transitions(tmp_path):
    make = lambda: make_model(QSM, make_env(n_envs=2), buffer_size=100)  # noqa: E731
    written = []

    class Watch(ResumeCallback):
        def _save(self):
            before = set((tmp_path / "replay_buffer").iterdir())
            super()._save()
            after = set((tmp_path / "replay_buffer").iterdir())
            written.append((len(after - before), sum(shard["rows"] for shard in self._shards)))

    make().learn(190, [Watch(10, tmp_path), StopAt(180)])
    # One new file of 10 rows each time, up to the 50 rows of the ring; then the oldest files go
    assert written == [(1, 10), (1, 20), (1, 30), (1, 40), (1, 50), (1, 50), (1, 50), (1, 50)]
    assert len(list((tmp_path / "replay_buffer").iterdir())) == 6  # those of the two checkpoints kept
    assert len(checkpoints(tmp_path)) == 2
    model = make()
    with pytest.warns(UserWarning, match="will now end at 160"):
        model.learn(160, Watch(10, tmp_path))
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (80 % 50, True)


def test_nothing_is_unpickled(saved):
    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    resume(saved)
    assert found == []


def resume(folder, env=None, algorithm=QSM, total=90, **kwargs):
    """Where the run goes on, without a step."""
    model = make_model(algorithm, env, **kwargs)
    model._setup_learn(total, ResumeCallback(20, folder))
    return model


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
    good = first_whole(checkpoints(saved))
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
        assert resume(folder).num_timesteps == 40
    shutil.rmtree(folder / "replay_buffer")
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match=r"(?s)no whole checkpoint.*rl_model_60_steps refused.*rl_model_40_steps refused"):
        make_model(QSM).learn(90, ResumeCallback(20, folder))
    assert before == sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_run_goes_on_over_a_broken_checkpoint(folder):
    expected, _ = learn(make_model(QSM), 90)
    (folder / "rl_model_60_steps" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="rl_model_60_steps refused"):
        assert learn(make_model(QSM), 90, ResumeCallback(20, folder))[0] == expected
    assert [path.name for path in checkpoints(folder)] == ["rl_model_90_steps", "rl_model_80_steps"]


def test_a_checkpoint_that_was_broken_is_replaced(folder):
    (folder / "rl_model_60_steps" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="rl_model_60_steps refused"):
        learn(make_model(QSM), 90, ResumeCallback(20, folder), StopAt(65))
    assert read_checkpoint(folder / "rl_model_60_steps").state["num_timesteps"] == 60


def test_other_format(folder):
    path = folder / "rl_model_60_steps" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.warns(UserWarning, match="format 1, this version reads format 2"):
        assert resume(folder).num_timesteps == 40


def test_other_versions(saved, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.1")
    with pytest.warns(UserWarning, match=r"perhaps not bit for bit: .*torch .* -> 0.1"):
        resume(saved)


@pytest.mark.parametrize(
    "env, name",
    [
        (lambda: make_env("InvertedPendulum-v5"), "env_id"),
        (lambda: make_env(g=9.0), "env_kwargs"),
        (lambda: make_env(n_envs=2), "n_envs"),
        (lambda: make_env(normalize=True), "env_wrappers"),
        (lambda: DummyVecEnv([lambda: gym.make("Pendulum-v1")]), "env_wrappers"),
    ],
)
def test_other_environment(saved, env, name):
    with pytest.raises(ValueError, match=f"^{name} must be that of the checkpoint .*rl_model_60_steps"):
        resume(saved, env())


class Relaxed(SAC):
    """Takes SAC's arguments as they come."""

    def __init__(self, policy, env, **kwargs):
        super().__init__(policy, env, **kwargs)


NOISE = NormalActionNoise(np.zeros(1), np.ones(1))
RELU = dict(net_arch=[8], activation_fn=th.nn.ReLU)


@pytest.mark.parametrize(
    "begun, given, message",
    [
        (dict(algorithm=SAC), dict(algorithm=TD3), r"algorithm must be that of .*\.SAC\", got .*\.TD3\": start the program"),
        (
            dict(gamma=0.99),
            dict(gamma=0.9),
            "gamma must be that of .* 0.99, got 0.9: start .* choose another save_path .* SAC.load",
        ),
        (dict(algorithm=Relaxed, tau=0.1), dict(algorithm=Relaxed, tau=0.2), "tau must be that of .* 0.1, got 0.2"),
        (dict(stats_window_size=5), dict(stats_window_size=6), "stats_window_size must be that of .* 5, got 6"),
        (dict(batch_size=np.int64(8)), dict(batch_size=np.int64(64)), "batch_size must be that of .* 8, got 64"),
        (dict(policy_kwargs=RELU), {}, r"policy_kwargs must be that of .*ReLU"),
        (
            dict(action_noise=NOISE),
            dict(action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.5))),
            r"action_noise .* got .*0\.5",
        ),
        (dict(learning_rate=LinearSchedule(1, 0, 1)), dict(learning_rate=LinearSchedule(1, 0, 0.5)), r"learning_rate .*=0\.5"),
        (dict(train_freq=(1, "step")), dict(train_freq=(1, "episode")), "train_freq must be that of"),
        (
            dict(algorithm=QSM, replay_buffer_class=ReplayBuffer),
            dict(algorithm=QSM),
            "replay_buffer_class must be that of .*ReplayBuffer",
        ),
    ],
)
def test_other_arguments(begun, given, message, tmp_path):
    make_model(**begun).learn(7, ResumeCallback(5, tmp_path))
    assert resume(tmp_path, **{"algorithm": SAC} | begun, total=7).num_timesteps == 7
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, **{"algorithm": SAC} | given, total=7)


def test_arguments_that_are_the_same(tmp_path):
    """A number of NumPy and Python's, the policy's name and its class."""
    make_model(batch_size=np.int64(8), policy_kwargs=dict(net_arch=[8])).learn(7, ResumeCallback(np.int64(5), tmp_path))
    kwargs = dict(batch_size=8, policy_kwargs=dict(net_arch=[np.int64(8)]), policy=SAC.policy_aliases["MlpPolicy"], verbose=1)
    assert resume(tmp_path, algorithm=SAC, total=7, **kwargs).num_timesteps == 7


def test_other_seed(saved):
    with pytest.warns(UserWarning, match="seed=7 is without effect: .* random numbers of seed=0"):
        resume(saved, seed=7)


def test_messages_of_a_run_that_goes_on(saved, capsys):
    make_model(QSM)._setup_learn(90, ResumeCallback(20, saved, verbose=1))
    assert capsys.readouterr().out == f"Going on from {saved / 'rl_model_60_steps'}\n"


def test_checkpoints_of_sb3(tmp_path):
    make_model().learn(30, CheckpointCallback(10, str(tmp_path), save_replay_buffer=True))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=r"SB3's CheckpointCallback \(rl_model_10_steps.zip\), .* with SAC.load, and choose another"
    ):
        make_model().learn(30, ResumeCallback(10, tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    # Beside one's own they are no hindrance
    callbacks = lambda: [ResumeCallback(10, tmp_path / "both"), CheckpointCallback(10, str(tmp_path / "both"))]  # noqa: E731
    expected, _ = learn(make_model(), 45)
    learn(make_model(), 45, *callbacks(), StopAt(35))
    assert learn(make_model(), 45, *callbacks())[0] == expected


def test_arguments_of_the_callback(tmp_path):
    for kwargs in [dict(save_freq=0), dict(save_freq=1.5), dict(save_freq=1, keep=0)]:
        name = "keep" if "keep" in kwargs else "save_freq"
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            ResumeCallback(save_path=tmp_path, **kwargs)
    for prefix in [".hidden", "a/b"]:
        with pytest.raises(ValueError, match=f"name_prefix must be the start of a file name.*{prefix}"):
            ResumeCallback(1, tmp_path, name_prefix=prefix)


def test_places_without_a_rollout(tmp_path):
    with pytest.raises(ValueError, match="callback must be ResumeCallback or a list with it, got one inside EveryNTimesteps"):
        make_model().learn(10, EveryNTimesteps(5, ResumeCallback(1, tmp_path)))


class Counting(ReplayBuffer):
    """A class of one's own that holds a number more."""

    n_added = 0

    def add(self, *args, **kwargs):
        self.n_added += 1
        super().add(*args, **kwargs)


class Prioritised(ReplayBuffer):
    """A class of one's own that holds an object from elsewhere."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tree = (i for i in range(3))


class OpaqueNoise(ActionNoise):
    def __init__(self):
        super().__init__()
        self.numbers = (0.1 for i in range(10**9))

    def __call__(self):
        return next(self.numbers)


def test_other_buffers(tmp_path):
    learn(make_model(replay_buffer_class=Counting), 30, ResumeCallback(10, tmp_path), StopAt(25))
    assert resume(tmp_path, algorithm=SAC, replay_buffer_class=Counting, total=30).replay_buffer.n_added == 20
    no_timeouts = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    for kwargs, message in [
        (
            dict(replay_buffer_class=Prioritised),
            "replay_buffer_class and action_noise must hold numbers.* got Prioritised and NoneType: replay_buffer.tree",
        ),
        (
            dict(action_noise=OpaqueNoise()),
            "action_noise must hold numbers only.* got ReplayBuffer and OpaqueNoise: action_noise",
        ),
        (no_timeouts, "optimize_memory_usage must be False for ResumeCallback, got True"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_model(**kwargs).learn(5, ResumeCallback(1, tmp_path))


def test_hindsight_and_on_policy(tmp_path):
    from stable_baselines3 import HerReplayBuffer
    from stable_baselines3.common.envs import BitFlippingEnv

    env = BitFlippingEnv(continuous=True)
    model = make_model(env=env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    with pytest.raises(
        ValueError, match=r"replay_buffer_class .* must hold numbers only.* got HerReplayBuffer .*: replay_buffer"
    ):
        model.learn(5, ResumeCallback(1, tmp_path))
    with pytest.raises(ValueError, match=r"resumes off-policy algorithms, .* got PPO"):
        PPO("MlpPolicy", "Pendulum-v1", device="cpu").learn(5, ResumeCallback(1, tmp_path))


def test_broken_weights_are_not_written(folder):
    class Break(BaseCallback):
        def _on_training_start(self):
            with th.no_grad():
                next(self.model.critic_target.parameters()).view(-1)[0] = float("nan")
            self.model.tau = 0.0  # keep it there, unseen by the losses
            self.model.learning_starts = 10**6

        def _on_step(self):
            return True

    before = first_whole(checkpoints(folder))
    with pytest.raises(ValueError, match=r"(?s)parameters.policy.critic_target.* must be finite, .* after 8\d steps"):
        make_model(QSM).learn(90, [ResumeCallback(20, folder), Break()])
    assert same(first_whole(checkpoints(folder)), before)
    model = make_model(ent_coef=0.1)
    model.ent_coef_tensor.fill_(float("nan"))
    model.learning_starts = 100
    with pytest.raises(ValueError, match=r"parameters.ent_coef_tensor must be finite, got nan after 20 steps"):
        model.learn(30, ResumeCallback(20, folder / "another"))


def test_full_disk(tmp_path):
    """The system refuses to write more than so many bytes to a file, as it would on a full disk; the training goes on."""
    expected = learn(make_model(QSM), 65)

    class FullInBetween(ResumeCallback):
        def _save(self):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if 30 <= self.num_timesteps < 50:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                super()._save()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.warns(
        UserWarning, match="no checkpoint at 40 steps: .* Training goes on; the next attempt follows in 20 calls"
    ):
        found = learn(make_model(QSM), 65, FullInBetween(20, tmp_path, keep=9))
    assert found == expected
    assert [path.name for path in checkpoints(tmp_path)] == [f"rl_model_{n}_steps" for n in (65, 60, 20)]
    assert not list(tmp_path.rglob("*tmp"))
    assert resume(tmp_path, total=65).num_timesteps == 65


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_model().learn(5, ResumeCallback(1, tmp_path / "file" / "run"))


def dm_control():
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    return DummyVecEnv([lambda: gym.wrappers.FlattenObservation(gym.make("dm_control/cartpole-swingup-v0"))])


@pytest.mark.parametrize("make", [lambda: DummyVecEnv([OpaqueEnv]), lambda: SubprocVecEnv([OpaqueEnv]), dm_control])
def test_environment_without_a_state(make, tmp_path):
    """The run goes on with a new episode, and says so; returns over several steps do not reach across."""
    model = make_model(QSM, VecNormalize(make()), n_steps=3)
    model.learn(30, [ResumeCallback(10, tmp_path), StopAt(25)])
    resumed = make_model(QSM, VecNormalize(make()), n_steps=3)
    with pytest.warns(UserWarning, match="(simulator|SubprocVecEnv|Physics).*new episode, not bit for bit"):
        resumed.learn(30, [ResumeCallback(10, tmp_path), StopAt(999)])
    assert resumed.num_timesteps == 30
    assert resumed.get_vec_normalize_env().obs_rms.count > 30
    assert resumed.replay_buffer.timeouts[:21].ravel().tolist() == [0.0] * 19 + [1.0, 0.0]
    # The row that was changed is in the next checkpoint
    final = make_model(QSM, VecNormalize(make()), n_steps=3)
    with pytest.warns(UserWarning, match="not bit for bit"):
        final.learn(30, ResumeCallback(10, tmp_path))
    assert final.replay_buffer.timeouts[:20].ravel().tolist() == [0.0] * 19 + [1.0]
    for each in (model, resumed, final):
        each.env.close()

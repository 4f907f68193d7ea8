import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3
import torch as th
import yaml
from gymnasium.utils.env_checker import check_env

pytest.importorskip("rliable")
pytest.importorskip("sb3_contrib")

from rliable.metrics import aggregate_iqm, probability_of_improvement

from benchmarks import variants
from benchmarks.__main__ import main
from benchmarks.algorithms import ALGORITHMS
from benchmarks.cells import make_model, run_cell
from benchmarks.executors import ROOT, run_ray
from benchmarks.figures import colors, panels
from benchmarks.pictures import START, reverse_chain, world_pictures
from benchmarks.report import aggregate_table, save_table, seed_table, write_report
from benchmarks.results import estimate, improvement, iqm, normalised, profile, read_results, scales, spread
from benchmarks.suites import SUITES, read_suite, select
from benchmarks.worlds import GOALS, N_OUTCOMES, MultiGoal
from sb3_qsm import QSM

FIGURES = ["curves-steps", "curves-sampled", "curves-time", "efficiency", "aggregate", "profiles", "probability"]
SUITE = {
    "n_timesteps": 250,
    "eval_freq": 100,
    "n_eval_episodes": 2,
    "seeds": [0, 1],
    "tasks": ["Pendulum-v1"],
    "algorithms": {
        "sac": {"default": {"policy": "MlpPolicy", "learning_starts": 200, "batch_size": 8}},
        "td3": {"default": {"policy": "MlpPolicy", "learning_starts": 200, "batch_size": 8}},
    },
}


def write_suite(folder: Path, **changes) -> str:
    """A suite file in ``folder``; returns its path."""
    file = folder / "tiny.yml"
    file.write_text(yaml.safe_dump({**SUITE, **changes}))
    return str(file)


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until ``condition()`` holds; the process must not end before."""
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)


# === Suites ===


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["Pendulum-v9"]}, "unknown task 'Pendulum-v9', valid: .*Pendulum-v1"),
        ({"algorithms": {"sca": {}}}, "unknown algorithm 'sca', valid: .*sac"),
        ({"n_steps": 3}, "unknown key in tiny.yml 'n_steps', valid: n_timesteps"),
        (
            {"algorithms": {"sac": {"default": {"policy": "MlpPolicy", "lr": 1}}}},
            "hyperparameter of sac 'lr', valid: .*learning_rate",
        ),
        ({"algorithms": {"sac": {"default": {"policy": "Mlp"}}}}, "unknown policy of sac 'Mlp', valid: MlpPolicy"),
        ({"algorithms": {"sac": {"Hopper-v5": {}}}}, "unknown task under sac 'Hopper-v5', valid: default, Pendulum-v1"),
        (
            {"algorithms": {"td3": {"default": {"policy": "MlpPolicy", "noise_type": "pink"}}}},
            "noise_type of td3 'pink', valid: normal",
        ),
        ({"algorithms": {"td3": {"default": {"policy": "MlpPolicy", "policy_kwargs": "dict("}}}}, "'dict\\(' cannot be read"),
        (
            {"algorithms": {"qsm": {"default": {"policy": "MlpPolicy", "score_target": "benchmarks.targets.nowhere"}}}},
            "score_target 'benchmarks.targets.nowhere' names no function: .* 'nowhere'",
        ),
        (
            {"algorithms": {"sac": {"default": {"policy": "MlpPolicy", "env_wrapper": "benchmarks.worlds.nowhere"}}}},
            "env_wrapper 'benchmarks.worlds.nowhere' names no function: .* 'nowhere'",
        ),
        (
            {"algorithms": {"dipo": {"default": {"policy": "MlpPolicy", "tau": "5e-3"}}}},
            "tau of dipo must be a number, got the text '5e-3'; in YAML write !!float",
        ),
        ({"n_timesteps": "1e5"}, r"n_timesteps in tiny\.yml must be a whole number of at least 1, got '1e5'"),
        ({"eval_freq": 0.5}, r"eval_freq in tiny\.yml must be a whole number of at least 1, got 0.5"),
    ],
)
def test_bad_suite_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["run", write_suite(tmp_path, **changes), "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yml"], "nothing may start"


def test_number_of_steps_as_in_rl_zoo(tmp_path):
    """``!!float 1e6`` is a float in YAML and a number of steps."""
    assert {repr(cell.n_timesteps) for cell in read_suite(write_suite(tmp_path, n_timesteps=1e6))} == {"1000000"}


@pytest.mark.parametrize("algorithm", ["sac", "td3", "tqc"])
@pytest.mark.parametrize("robot", ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"])
def test_settings_of_the_rivals_are_those_of_rl_zoo(algorithm, robot):
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml").read_text())
    ours = yaml.safe_load((SUITES.parent / "hyperparams" / f"{algorithm}.yml").read_text())
    expected = {key: value for key, value in theirs[f"{robot}-v4"].items() if key != "n_timesteps"}
    assert ours.get(f"{robot}-v5", ours["default"]) == expected


def test_missing_key_is_refused(tmp_path):
    file = tmp_path / "tiny.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in SUITE.items() if key != "seeds"}))
    with pytest.raises(ValueError, match=r"tiny\.yml lacks 'seeds'"):
        read_suite(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algos", "sca"], "unknown algorithm in this suite 'sca', valid: sac, td3"),
        (["--tasks", "Hopper-v5"], "unknown task in this suite 'Hopper-v5', valid: Pendulum-v1"),
        (["--seeds", "7"], "unknown seed in this suite 7, valid: 0, 1"),
        (["--executor", "slurm"], "unknown executor 'slurm', valid: local, ray"),
    ],
)
def test_bad_command_line_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["run", write_suite(tmp_path), "--out", str(tmp_path), *arguments])


def test_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"unknown suite 'mujoco', valid: .*mujoco-100k"):
        read_suite("mujoco")


def shipped_suite(name):
    if name.startswith("dmc"):
        pytest.importorskip("shimmy")
        pytest.importorskip("dm_control")
    return read_suite(name)


@pytest.mark.parametrize("name", sorted(file.stem for file in SUITES.glob("*.yml")))
def test_shipped_suites_are_valid(name):
    cells = shipped_suite(name)
    assert len({cell.folder for cell in cells}) == len(cells)


def test_smoke_has_every_rival():
    assert {cell.algorithm for cell in read_suite("smoke")} == set(ALGORITHMS)


def test_variant_is_its_own_cell(tmp_path):
    label = {"sac-small": {"default": {"policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[7])"}}}
    cell = read_suite(write_suite(tmp_path, algorithms=label))[0]
    assert cell.folder == Path("tiny/Pendulum-v1/sac-small/seed0")
    assert make_model(cell).policy.net_arch == [7]


# === Cells ===


def test_cell_leaves_a_whole_result(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    assert run_cell(cell, tmp_path)
    folder = tmp_path / cell.folder
    assert {file.name for file in folder.iterdir()} == {"evaluations.csv", "training.csv", "meta.json", "model.zip"}
    evaluations = rows(folder / "evaluations.csv")
    assert [(row["step"], row["mode"]) for row in evaluations] == [
        (step, mode) for step in ("0", "100", "200", "250") for mode in ("sampled", "deterministic")
    ]
    returns = [[float(row["return_0"]), float(row["return_1"])] for row in evaluations]
    assert returns[0] == returns[2] == returns[4], "the same weights and start states give the same returns"
    assert returns[4] != returns[6] and returns[0] != returns[1]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"] == f"python -m benchmarks cell {cell.suite} --tasks Pendulum-v1 --algos sac --seeds 0 --steps 250"
    assert meta["versions"]["torch"] == th.__version__
    assert meta["machine"]["threads"] == 1
    assert 100 < meta["peak_memory_mb"] < 10_000 and 0 < meta["ms_per_action"] < 1000


def test_peak_memory_is_that_of_the_process_itself():
    ballast = np.ones(200_000_000 // 8)  # of the parent: does not count
    code = (
        "import numpy as np; from benchmarks.cells import peak_memory_mb as peak; before = peak(); np.ones(300_000_000 // 8); "
    )
    done = subprocess.run([sys.executable, "-c", code + "print(before, peak())"], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert len(ballast) and before > 50
    assert after - before == pytest.approx(300, abs=20)


def test_no_evaluation_beyond_the_last_step(tmp_path):
    """SB3 finishes its rollout of 64 steps: 250 are asked for and 256 are taken."""
    rollouts = {"sac": {"default": {**SUITE["algorithms"]["sac"]["default"], "train_freq": 64, "gradient_steps": 1}}}
    cell = read_suite(write_suite(tmp_path, algorithms=rollouts))[0]
    assert run_cell(cell, tmp_path)
    steps = [row["step"] for row in rows(tmp_path / cell.folder / "evaluations.csv")]
    assert steps == [step for step in ("0", "100", "200", "250") for _ in range(2)]


def test_evaluation_does_not_change_training(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    run_cell(cell, tmp_path)
    alone = make_model(cell).learn(cell.n_timesteps)
    evaluated = type(alone).load(tmp_path / cell.folder / "model")
    for a, b in zip(alone.policy.state_dict().values(), evaluated.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_finished_cell_is_neither_redone_nor_overwritten(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    run_cell(cell, tmp_path)
    before = (tmp_path / cell.folder / "meta.json").stat().st_mtime_ns
    assert run_cell(cell, tmp_path)
    assert (tmp_path / cell.folder / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with n_timesteps 250, not 300"):
        run_cell(replace(cell, n_timesteps=300), tmp_path)
    meta = tmp_path / cell.folder / "meta.json"
    meta.write_text(meta.read_text().replace('"tau": "0.005"', '"tau": "0.01"'))
    with pytest.raises(ValueError, match=r"was made with default tau '0.01', not '0.005': move it away"):
        run_cell(cell, tmp_path)


def test_failed_cell_keeps_its_traceback_and_the_others_run(tmp_path):
    broken = {"default": {"policy": "MlpPolicy", "batch_size": -1, "learning_starts": 10}}
    suite = write_suite(tmp_path, algorithms={"sac": broken, "td3": SUITE["algorithms"]["td3"]}, seeds=[0], n_timesteps=50)
    assert main(["run", suite, "--out", str(tmp_path)]) == 1
    assert "Traceback" in (tmp_path / "tiny/Pendulum-v1/sac/seed0/error.txt").read_text()
    assert (tmp_path / "tiny/Pendulum-v1/td3/seed0/meta.json").exists()


def test_killed_runner_leaves_nothing_half_written(tmp_path):
    suite = write_suite(tmp_path, seeds=[0], n_timesteps=1_000_000)
    command = [sys.executable, "-m", "benchmarks", "run", suite, "--algos", "sac", "--out", str(tmp_path)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = tmp_path / "tiny/Pendulum-v1/sac"
    part = folder / ".seed0.tmp/evaluations.csv"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, runner)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not (folder / "seed0").exists()
    # The orphan notices and lets go of its lock; the next who comes redoes the cell.
    # In a process like the one that began it: the zoo, which other tests import, puts its own TimeLimit around environments
    again = [*command[:3], "cell", write_suite(tmp_path, seeds=[0]), "--algos", "sac", "--out", str(tmp_path)]
    subprocess.run(again, cwd=ROOT, check=True)
    assert [row["step"] for row in rows(folder / "seed0/evaluations.csv")][-1] == "250"
    assert not (folder / ".seed0.tmp").exists()


def test_killed_worker_is_noted_and_redone(tmp_path):
    suite = write_suite(tmp_path, seeds=[0], n_timesteps=1_000_000)
    folder = tmp_path / "tiny/Pendulum-v1/td3"
    (folder / "seed0").mkdir(parents=True)
    (folder / "seed0/error.txt").write_text("last week")
    command = [sys.executable, "-m", "benchmarks", "run", suite, "--algos", "td3", "--out", str(tmp_path)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / ".seed0.tmp").exists(), runner)
    assert not (folder / "seed0/error.txt").exists(), "the error of an earlier attempt says nothing about this one"
    worker = subprocess.run(["pgrep", "-P", str(runner.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(worker), signal.SIGKILL)
    assert runner.wait() == 1
    assert "SIGKILL" in (folder / "seed0/error.txt").read_text()
    assert not (folder / "seed0/meta.json").exists()
    again = [*command[:3], "cell", write_suite(tmp_path, seeds=[0]), "--algos", "td3", "--out", str(tmp_path)]
    subprocess.run(again, cwd=ROOT, check=True)
    assert not (folder / "seed0/error.txt").exists()


@pytest.mark.expensive
def test_power_cut_loses_only_the_cell_in_flight(tmp_path):
    idle = {"td3": {"default": {"policy": "MlpPolicy", "learning_starts": 1_000_000}}}
    suite = write_suite(tmp_path, algorithms=idle, n_timesteps=2000, eval_freq=2000)
    command = [sys.executable, "-m", "benchmarks", "run", suite, "--out", str(tmp_path)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    first, second = (tmp_path / f"tiny/Pendulum-v1/td3/seed{seed}" for seed in (0, 1))
    part = second.with_name(".seed1.tmp") / "evaluations.csv"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, runner)
    os.killpg(runner.pid, signal.SIGKILL)  # the runner and its worker, at the same moment
    runner.wait()
    made = (first / "meta.json").stat().st_mtime_ns
    assert not second.exists()
    assert main(["cell", suite, "--out", str(tmp_path)]) == 0
    assert (first / "meta.json").stat().st_mtime_ns == made
    assert rows(second / "evaluations.csv")[-1]["step"] == "2000"


def test_printed_commands_are_the_cells(tmp_path, capsys):
    suite = write_suite(tmp_path)
    assert main(["run", suite, "--print-commands", "--out", str(tmp_path), "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert main(lines[0].split()[3:]) == 0
    assert (tmp_path / "tiny/Pendulum-v1/sac/seed1/meta.json").exists()


@pytest.mark.expensive
def test_ray_runs_the_cells_of_a_killed_node_again(tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cells = select(read_suite(write_suite(tmp_path, seeds=[0, 1, 2], n_timesteps=1000)), algorithm=["td3"])
    run_cell(cells[-1], tmp_path / "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    doomed = cluster.add_node(num_cpus=1)
    try:
        running = run_ray(cells, tmp_path, 1, lambda *_: None, cluster.address)
        ended = [next(running)]
        cluster.add_node(num_cpus=1)
        cluster.remove_node(doomed, allow_graceful=False)
        ended += running
    finally:
        cluster.shutdown()
    assert {cell.seed for cell in ended} == {0, 1, 2}
    assert all(cell.is_finished(tmp_path) for cell in cells)
    # The same numbers as a process on this machine, apart from the seconds.
    there, here = (rows(root / cells[-1].folder / "evaluations.csv") for root in (tmp_path, tmp_path / "local"))
    assert [{**row, "training_s": ""} for row in there] == [{**row, "training_s": ""} for row in here]


# === Worlds ===


@pytest.mark.parametrize("world", N_OUTCOMES)
def test_worlds_follow_gymnasium(world):
    check_env(gym.make(world).unwrapped, skip_render_check=True)


def test_four_actions():
    env = gym.make("FourActions-v0")
    found = []
    for action in ([0.6, -0.6], [0.6, -0.3], [0.6, -0.2], [-0.6, 0.6]):
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(np.array(action, np.float32))
        found.append((round(reward, 4), terminated, info["outcome"]))
    assert found == [(0.0, True, 2), (-0.36, True, 2), (-0.64, True, -1), (0.0, True, 1)]


@pytest.mark.parametrize(
    ("move", "expected"),
    [(lambda position: np.zeros(2), -718), (lambda position: 0.5 * np.array([1.0, 0.0]), -116)],
    ids=["standing still", "straight line at speed 0.5"],
)
def test_multi_goal_reference_returns(move, expected):
    env = gym.make("MultiGoal-v0")
    returns = []
    for seed in range(200):
        position, _ = env.reset(seed=seed)
        # Towards the right-hand goal, but from where it is the nearest: the world is symmetric
        env.unwrapped.position = position = np.abs(position)[np.argsort(-np.abs(position))]
        total, over = 0.0, False
        while not over:
            position, reward, terminated, truncated, _ = env.step(move(position).astype(np.float32))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(expected, abs=2)


def test_multi_goal_by_hand():
    env = gym.make("MultiGoal-v0").unwrapped
    for goal, direction in enumerate(GOALS / 5):
        env.reset(options={"position": 3.5 * direction})
        _, reward, terminated, _, info = env.step(0.5 * direction)  # to 4, distance 1: not yet
        assert (reward, terminated, info["outcome"]) == (pytest.approx(-30 * 0.25 - 1), False, -1)
        _, reward, terminated, _, info = env.step(2 * direction)  # clipped to 1: to 5
        assert (reward, terminated, info["outcome"]) == (pytest.approx(-30 + 10), True, goal)


def test_swing_up_is_the_same_either_way():
    ends = []
    for side in (-1.0, 1.0):
        env = gym.make("CartPoleSwingUp-v0").unwrapped
        env.reset(seed=0)
        env.state = np.array([0.0, 0.0, np.pi, 0.0])
        total = 0.0
        for _ in range(250):
            angle_dot = env.state[3] or side
            _, reward, _, _, info = env.step(np.array([-np.sign(angle_dot * np.cos(env.state[2]))], np.float32))  # pump energy
            total += reward
            if info["outcome"] >= 0:
                break
        ends.append((total, info["outcome"]))
    (left_return, left), (right_return, right) = ends
    assert {left, right} == {0, 1}
    assert left_return == pytest.approx(right_return)


def test_pole_keeps_its_energy():
    # Frictionless and not pushed: what it falls it climbs again, on the side it came from and no further
    env = gym.make("CartPoleSwingUp-v0").unwrapped
    env.reset(seed=0)
    env.state = np.array([0.0, 0.0, np.pi / 2, 0.0])
    angles = []
    for _ in range(250):
        env.step(np.zeros(1, np.float32))
        angles.append(env.state[2])
    assert max(angles) == pytest.approx(3 * np.pi / 2, abs=0.1)
    assert min(angles) == pytest.approx(np.pi / 2, abs=0.1)


@pytest.mark.parametrize("label, factor", [("tenth", 0.1), ("tenfold", 10.0)])
def test_reward_scale(label, factor):
    cells = select(read_suite("reward-scale"), algorithm=[f"qsm-{label}"])
    wrap = resolve_name(cells[0].hyperparams["env_wrapper"])
    scaled, plain = wrap(MultiGoal()), MultiGoal()
    for env in (scaled, plain):
        env.reset(seed=0)
    assert scaled.step(np.ones(2))[1] == pytest.approx(factor * plain.step(np.ones(2))[1])


FLAT = 0.2668  # mean of N(0.6, 0.75^2) on [-1, 1], by numerical integration


@pytest.mark.parametrize(
    "label, point", [("at_answer", -0.4), ("at_flat", FLAT), ("at_noisy", 0.48), ("no_clip", 0.36 * FLAT + 0.64 * -0.4)]
)
def test_ablated_target(label, point):
    (cell,) = select(read_suite("ablation"), algorithm=[f"qsm-{label}"], task=["Hopper-v5"], seed=[0])
    target = make_model(cell)._score_target
    denoised, noisy, alpha, sigma = (th.tensor([[x]]) for x in (-0.4, 0.48, 0.8, 0.6))
    _, q_grad = target(lambda a: a**2 / 2, denoised, noisy, alpha, sigma, th.tensor(1.0))
    assert q_grad.item() == pytest.approx(point, abs=1e-4)
    # Q = 20 a shifts by 0.75 * 20 = 15 units of r uncut: exp(20 a) N(a; 0.6, 0.75^2) is a normal around 11.85, on the box
    answer, _ = target(lambda a: 20 * a, denoised, noisy, alpha, sigma, th.tensor(1.0))
    cut, uncut = 0.8100, 0.9486
    assert answer.item() == pytest.approx(uncut if label == "no_clip" else cut, abs=1e-4)


# === Statistics and report ===


def test_statistics_by_hand():
    scores = np.array([[0.0], [1.0], [2.0], [30.0]])
    assert iqm(scores) == 1.5
    assert iqm(scores) == pytest.approx(aggregate_iqm(scores))
    ours, theirs = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0], [0.0, 9.0]])
    assert improvement(ours, theirs) == pytest.approx((3 / 4 + (0.5 + 0.5) / 4) / 2)
    untied = np.random.default_rng(0).normal(size=(2, 4, 3))
    assert improvement(*untied) == pytest.approx(probability_of_improvement(*untied))
    assert profile(scores, np.array([-1.0, 1.0, 40.0])).tolist() == [1.0, 0.5, 0.0]
    value, low, high = estimate(iqm, scores)
    assert value == 1.5 and low < 1.5 < high
    assert str(estimate(iqm, untied[0])) == str(estimate(iqm, untied[0])), "the same report every time"
    value, low, high = estimate(improvement, ours[:1], theirs)
    assert value == 0.375 and np.isnan([low, high]).all(), "one run says nothing about others"


def test_spread_by_hand():
    assert spread(np.array([0, 1, 2, 3]), 4) == pytest.approx((1.0, 1.0, 1.0))
    assert spread(np.array([2, 2, -1, -1]), 4) == pytest.approx((0.25, 0.0, 0.5))
    assert spread(np.array([0, 1, 0, 1]), 4) == pytest.approx((0.5, 0.5, 1.0))
    assert spread(np.array([-1, -1]), 4) == (0.0, 0.0, 0.0)


def write_result(out: Path, task: str, algorithm: str, seed: int, returns: tuple[float, ...]) -> None:
    """A finished cell, evaluated every hundred steps over two episodes, ``returns`` on average."""
    folder = out / "tiny" / task / algorithm / f"seed{seed}"
    folder.mkdir(parents=True)
    lines = ["step,training_s,mode,return_0,return_1"]
    for i, value in enumerate(returns):
        lines += [f"{100 * i},{10 * i},{mode},{value - 1},{value + 1}" for mode in ("sampled", "deterministic")]
    (folder / "evaluations.csv").write_text("\n".join(lines))
    cell = {"task": task, "algorithm": algorithm, "seed": seed, "n_eval_episodes": 2, "hyperparams": {"policy": "MlpPolicy"}}
    meta = {
        "cell": cell,
        "command": f"train {task} {algorithm} {seed}",
        "git_revision": "abc",
        "device": "cpu",
        "started": "now",
    }
    meta |= {
        "training_s": 10.0,
        "steps_per_s": 10.0,
        "ms_per_action": 1.25,
        "peak_memory_mb": 300,
        "machine": {"cpu": "any", "threads": 1},
        "versions": {},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two tasks, the second with negative returns; twice SAC on the first, half-way better on the second."""
    out = tmp_path_factory.mktemp("results")
    for seed in (0, 1):
        write_result(out, "Up-v0", "sac", seed, (0.0, 90.0 + 20 * seed))
        write_result(out, "Up-v0", "qsm", seed, (0.0, 200.0))
        write_result(out, "Down-v0", "sac", seed, (-1000.0, -200.0))
        write_result(out, "Down-v0", "qsm", seed, (-1000.0, 200.0))
    write_result(out, "Up-v0", "td3", 0, (0.0, 50.0))
    return out / "tiny"


@pytest.fixture(scope="module")
def page(results):
    return write_report(results)


def test_scores_are_normalised_by_sac(results):
    found = read_results(results)
    scale = scales(found, "sac")
    assert scale == {"Down-v0": (-1000.0, -200.0), "Up-v0": (0.0, 100.0)}
    finals = {name: curves[..., -1].tolist() for name, curves in normalised(found, scale, "deterministic").items()}
    assert finals == {"qsm": [[1.5, 2.0], [1.5, 2.0]], "sac": [[1.0, 0.9], [1.0, 1.1]]}, "td3 lacks a task"


@pytest.mark.parametrize(
    ("untrained", "final", "zero"), [(-9.0, 4.0, 0.0), (-9.0, -4.0, -9.0), (-3.0, -4.0, -8.0), (1.0, 0.0, -1.0)]
)
def test_scale_is_never_upside_down(tmp_path, untrained, final, zero):
    write_result(tmp_path, "Any-v0", "sac", 0, (untrained, final))
    assert scales(read_results(tmp_path / "tiny"), "sac") == {"Any-v0": (zero, final)}


def test_report_traces_every_number(page):
    with open(page.parent / "aggregate.csv", newline="") as lines:
        qsm, sac = list(csv.DictReader(lines))[:2]
    assert (qsm["algorithm"], float(qsm["final"]), float(qsm["P(better than sac)"])) == ("qsm", 1.75, 1.0)
    assert float(sac["final"]) == 1.0
    assert qsm["cells"].split() == [f"{task}/qsm/seed{seed}" for seed in (0, 1) for task in ("Down-v0", "Up-v0")]
    tasks = {(row["task"], row["algorithm"], row["actions"]): row for row in rows(page.parent / "tasks.csv")}
    assert tasks["Up-v0", "qsm", "deterministic"]["steps to sac's end"] == "100"
    assert tasks["Up-v0", "td3", "deterministic"]["steps to sac's end"] == "-"
    assert {row["ms per action, median"] for row in rows(page.parent / "cost.csv")} == {"1.25"}
    text = page.read_text()
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert links == set(re.findall(r'<tr id="([^"]+)"', text)) and len(links) == 9
    assert all(f"train {task} {name} {seed}" in text for task, name, seed in [("Up-v0", "td3", 0), ("Down-v0", "qsm", 1)])
    assert not re.search(r'(src|href)="(?!data:|#)', text), "self-contained"
    images = [base64.b64decode(image) for image in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert images == [(page.parent / f"{name}.png").read_bytes() for name in FIGURES]


def test_every_seed_is_in_the_report(page):
    table = {(row["task"], row["algorithm"]): row for row in rows(page.parent / "seeds.csv")}
    assert table["Up-v0", "sac"]["end, sampled"] == "90, 110"
    assert table["Up-v0", "qsm"]["seeds"] == "0, 1" and table["Up-v0", "qsm"]["end, deterministic"] == "200, 200 (2.00)"
    assert table["Up-v0", "td3"]["mean over training, sampled"] == "25 (0.50)"
    assert table["Down-v0", "qsm"]["end, sampled"] == "200, 200", "no ratio to a negative return"


def test_no_ratio_where_the_reference_has_not_run(tmp_path):
    write_result(tmp_path, "Any-v0", "qsm", 3, (0.0, 40.0))
    (row,) = seed_table(read_results(tmp_path / "tiny"), "sac")
    assert (row["seeds"], row["end, sampled"], row["mean over training, sampled"]) == ("3", "40", "20")


def test_a_folder_with_two_evaluation_grids_is_refused(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path, "Any-v0", "sac", seed, (0.0, 40.0))
    write_result(tmp_path, "Any-v0", "qsm", 3, (0.0, 20.0, 40.0))
    with pytest.raises(ValueError, match=r"Any-v0/qsm/seed3 .* \[0, 100, 200\], other cells at \[0, 100\]: .* 1 of 3 cells"):
        read_results(tmp_path / "tiny")


def test_report_of_an_unfinished_matrix(tmp_path):
    """No seed of the reference has all tasks: the tables of single tasks are there, and the page says what is missing."""
    for task, seed in (("Up-v0", 0), ("Down-v0", 1)):
        for algorithm in ("sac", "qsm"):
            write_result(tmp_path, task, algorithm, seed, (0.0, 90.0))
    page = write_report(tmp_path / "tiny")
    assert "No aggregate: no seed of sac has all of its tasks." in page.read_text()
    assert len(rows(page.parent / "seeds.csv")) == 4 and not (page.parent / "aggregate.csv").exists()


def test_one_choice_of_seeds(tmp_path):
    """A seed that lacks a task counts neither for the scale nor for a score, and is not named."""
    for seed, end in ((0, 100.0), (1, 300.0)):
        write_result(tmp_path, "Up-v0", "sac", seed, (0.0, end))
    write_result(tmp_path, "Down-v0", "sac", 0, (0.0, 50.0))
    results = read_results(tmp_path / "tiny")
    scale = scales(results, "sac")
    assert scale == {"Down-v0": (0.0, 50.0), "Up-v0": (0.0, 100.0)}
    sampled, deterministic = aggregate_table(results, scale, "sac")
    assert (sampled["final"], sampled["seeds"]) == (deterministic["final"], deterministic["seeds"]) == (1.0, 1)
    assert [it.name for it in sampled["cells"]] == ["Down-v0/sac/seed0", "Up-v0/sac/seed0"]


def test_scale_of_dm_control(tmp_path):
    """Its returns have a scale of their own; a ratio to a rival that has hardly begun to learn would be any number."""
    write_result(tmp_path, "dm_control-hopper-hop-v0", "sac", 0, (0.0, 0.2))
    meta = tmp_path / "tiny" / "dm_control-hopper-hop-v0" / "sac" / "seed0" / "meta.json"
    meta.write_text(meta.read_text().replace("dm_control-", "dm_control/"))
    assert scales(read_results(tmp_path / "tiny"), "sac") == {"dm_control/hopper-hop-v0": (0.0, 1000.0)}


@pytest.mark.parametrize("suite", ["mujoco-100k", "mujoco-300k", "dmc-100k", "ablation"])
def test_results_are_of_todays_settings(suite):
    """The suite's hyperparameters made them, and, where a result notes the constructor's defaults, so did today's."""
    assert any([cell.is_finished(ROOT / "benchmarks" / "results") for cell in shipped_suite(suite)])


def committed_results(suite):
    """Results of the suite that a fresh clone has, whatever was run here since; all where there is no checkout."""
    folder = ROOT / "benchmarks" / "results" / suite
    listing = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True)
    tracked = set(listing.stdout.split("\0"))
    return [
        it for it in read_results(folder) if listing.returncode or str((it.folder / "meta.json").relative_to(ROOT)) in tracked
    ]


@pytest.mark.parametrize("suite", ["mujoco-100k", "mujoco-300k", "dmc-100k"])
def test_results_page_has_the_measured_numbers(suite, tmp_path):
    save_table(seed_table(committed_results(suite), "sac"), "seeds", tmp_path)
    assert (tmp_path / "seeds.md").read_text() in (ROOT / "docs" / "results.md").read_text()


def test_ablation_table_has_the_measured_numbers():
    header, *rows = variants.table(committed_results("ablation"), committed_results("mujoco-100k"))
    order = [header.index(key) for key in ("HalfCheetah-v5", "Hopper-v5", "Ant-v5", "end", "over training")]
    whole = [[row[column] for column in order] for row in rows if row[-1]]  # with all tasks and seeds
    assert len(whole) == 14, "the default and thirteen changed parts"
    page = (ROOT / "docs" / "algorithm.md").read_text()
    assert [row for row in whole if f"| {' | '.join(row)} |\n" not in page] == []


def test_variants_need_the_defaults_tasks_and_seeds():
    with pytest.raises(ValueError, match=r"defaults lacks qsm on .*'Ant-v5', 1.*, expected each task and seed"):
        variants.table(committed_results("ablation"), committed_results("mujoco-30k"))


def test_report_opens_in_a_browser(page, tmp_path):
    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no browser is installed: needs chromium, chromium-browser or google-chrome")
    # What a reader sees: how many images are decoded, whether any leaves the page, whether each link has its row
    script = """<script>
        const images = [...document.images], links = [...document.links];
        document.title = JSON.stringify({
            shown: images.filter(i => i.complete && i.naturalWidth > 300).length,
            fit: images.every(i => i.getBoundingClientRect().right <= document.documentElement.clientWidth),
            scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth,
            dead: links.filter(a => !document.getElementById(decodeURIComponent(a.hash.slice(1)))).length,
            links: links.length,
        });
    </script>"""
    copy = tmp_path / "index.html"
    copy.write_text(page.read_text() + script)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={tmp_path}"]
    command = [browser, *flags, "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    seen = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert seen == {"shown": len(FIGURES), "fit": True, "scrolls": False, "dead": 0, "links": seen["links"]}
    assert seen["links"] > 9, "each cell is linked from a summary"


@pytest.mark.parametrize("n_panels", [1, 2, 6])
def test_legend_of_every_rival_is_in_the_figure(n_panels):
    figure, axes = panels(n_panels, colors(list(ALGORITHMS)))
    figure.canvas.draw()
    (legend,) = figure.legends
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()
        assert box.y0 >= max(ax.get_window_extent().y1 for ax in axes), "above the panels"
    names = [*ALGORITHMS, *(f"qsm-{i}" for i in range(30))]
    assert len(set(colors(names).values())) == len(names)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no finished cell in .*expected"):
        write_report(tmp_path)


@pytest.mark.expensive
def test_pictures_of_a_trained_world(tmp_path):
    algorithms = {name: {"default": {"policy": "MlpPolicy", "batch_size": 8}} for name in ("qsm", "td3", "tqc")}
    worlds = list(N_OUTCOMES)
    suite = write_suite(tmp_path, tasks=worlds, algorithms=algorithms, seeds=[0], n_timesteps=120)
    for cell in read_suite(suite):
        assert run_cell(cell, tmp_path)
    results = read_results(tmp_path / "tiny")
    names = [name for name, _, _ in world_pictures(results)]
    assert names == [f"{world}-{kind}" for world in worlds for kind in ("paths", "actions", "chain")]
    assert results[0].outcomes("sampled").shape == (3, 2)


def test_reverse_chain_ends_in_what_the_policy_does(tmp_path):
    model = QSM("MlpPolicy", "MultiGoal-v0", seed=0, learning_starts=10, device="cpu").learn(30)
    th.manual_seed(0)
    chain = reverse_chain(model, START["MultiGoal-v0"])
    th.manual_seed(0)
    noise = th.randn(1 + len(chain) - 1, *chain[0].shape)
    actions = model.policy.actor.sample(th.zeros(len(chain[0]), 2), noise).detach().numpy()
    assert np.array_equal(chain[0], noise[0].numpy()) and np.array_equal(chain[-1], actions)
    assert len(chain) == 1 + model.policy.actor.noise_schedule.n_steps

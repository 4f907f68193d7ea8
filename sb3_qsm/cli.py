"""
Train policies, watch, film, export and compare them. rl-zoo is the engine, and its YAML files are the format.
"""

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import gymnasium as gym

import sb3_qsm

Command = Callable[[list[str]], None]
Check = Callable[["Parser", Any], None]
# Whose errors are messages to the user, in one line; those of environments and of PyTorch keep their traceback
SPEAKING = ("sb3_qsm", "benchmarks", "rl_zoo3", "stable_baselines3", "gymnasium")
# Modules that only an extra brings
EXTRAS = {
    "mujoco": ("mujoco", "imageio", "packaging"),
    "zoo": ("rl_zoo3", "huggingface_sb3", "shimmy", "optuna", "matplotlib", "yaml"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "benchmarks": ("sb3_contrib", "scipy", "jinja2", "filelock", "pandas", "rich"),
    "ray": ("ray",),
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "", -1, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """
    Options of a command. The zoo's scripts add theirs, then ask for the values.

    :param command: its name and docstring are those of the help
    :param example: a command line
    :param check: called with the parser and the values, which it may change
    :param defaults: defaults in place of the options' own
    """

    def __init__(self, command: Command, example: str, check: Check | None = None, **defaults: Any) -> None:
        name, epilog = f"sb3-qsm {command.__name__}", f"example:\n  sb3-qsm {command.__name__} {example}"
        super().__init__(name, description=command.__doc__, epilog=epilog, formatter_class=_Formatter)
        self.check, self.defaults = check, {"algo": "qsm", "folder": "logs", "log_folder": "logs", **defaults}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """
        :param args: command line, None for the program's
        :param namespace: where to put the values
        :return: the values, checked
        """
        for action in self._actions:
            if action.dest == "env":
                action.required = True
            elif action.dest == "n_timesteps":
                action.type = _steps
        self.set_defaults(**self.defaults)
        try:
            found = super().parse_args(args, namespace)
        except (SyntaxError, NameError) as error:  # the zoo evaluates the values of -params and --env-kwargs
            self.error(f"values are Python, with quotes around texts, as in \"policy:'MlpPolicy'\": {error}")
        for module in getattr(found, "gym_packages", ()):
            importlib.import_module(module)
        if hasattr(found, "env"):
            found.env = type(found.env)(_known_task(getattr(found.env, "gym_id", found.env)))
        if self.check is not None:
            self.check(self, found)
        return found

    def error(self, message: str) -> NoReturn:
        """
        :param message: what is wrong
        """
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _steps(text: str) -> int:
    return int(float(text))


def _known_task(task: str) -> str:
    """The id of a task that is registered, or will be when its module is imported: ``package.module:EnvId``."""
    module, _, env_id = task.rpartition(":")
    if module or env_id.startswith("dm_control/"):
        importlib.import_module(module or "shimmy")
    return gym.spec(env_id).id


def _has_display() -> bool:
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _run_zoo(script: str, parser: Any, arguments: list[str]) -> None:
    """Run a script of the zoo, which is a function in a module of that name, with our parser and our experiment."""
    from sb3_qsm.zoo import Experiment, register

    register()
    module: Any = importlib.import_module(f"rl_zoo3.{script}")
    module.argparse, module.ExperimentManager = SimpleNamespace(ArgumentParser=lambda: parser), Experiment
    sys.argv = [script, *arguments]
    getattr(module, script)()


def _find_hyperparameters(parser: Parser, args: Any) -> None:
    shipped = Path(__file__).parent / "hyperparams" / f"{args.conf_file or args.algo}.yml"
    if shipped.is_file():
        args.conf_file = str(shipped)
    elif args.conf_file is not None and Path(args.conf_file).suffix:  # the zoo takes modules, too
        if not Path(args.conf_file).is_file():
            parser.error(f"argument -c: no file {args.conf_file!r}")
        args.conf_file = str(Path(args.conf_file).resolve())


def _find_model(parser: Parser, args: Any) -> tuple[Path, Path]:
    """Files of a trained model: its weights, and the folder of its settings."""
    from huggingface_sb3 import EnvironmentName
    from rl_zoo3.utils import get_model_path

    name = EnvironmentName(getattr(args.env, "gym_id", args.env))
    which: Any = [getattr(args, it, None) for it in ("load_best", "load_checkpoint", "load_last_checkpoint")]
    try:
        _, model, folder = get_model_path(args.exp_id, args.folder, args.algo, name, *which)
    except (AssertionError, ValueError) as error:
        parser.error(f"{error}; `sb3-qsm train --algo {args.algo} --env {name.gym_id} -f {args.folder}` makes one")
    return Path(model), Path(folder, name)


def _saved_arguments(settings: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.unsafe_load((settings / "args.yml").read_text()))  # the zoo's dump of an OrderedDict


def _load(parser: Parser, args: Any, **env_kwargs: Any) -> tuple[Any, Any]:
    """A trained model and its environment, with the wrappers of the training."""
    from rl_zoo3.utils import ALGOS, create_test_env, get_saved_hyperparams

    from sb3_qsm.zoo import register

    register()
    model, settings = _find_model(parser, args)
    hyperparams, stats_path = get_saved_hyperparams(str(settings), test_mode=True)
    env_kwargs = {**hyperparams.pop("env_kwargs", {}), **(_saved_arguments(settings)["env_kwargs"] or {}), **env_kwargs}
    env = create_test_env(args.env, 1, stats_path, args.seed, None, False, hyperparams, env_kwargs)
    return ALGOS[args.algo].load(model, env=env, device="cpu"), env


def _add_run_options(parser: Parser) -> None:
    """Options that choose a trained run, named as the zoo's."""
    parser.add_argument("--env", help="environment ID")
    parser.add_argument("--algo", help="RL Algorithm")
    parser.add_argument("-f", "--folder", help="Log folder")
    parser.add_argument("--exp-id", type=int, default=0, help="Experiment ID (0: latest)")
    parser.add_argument("--load-best", action="store_true", help="Load best model instead of last model if available")
    parser.add_argument("--seed", type=int, default=0, help="Random generator seed")


def train(arguments: list[str]) -> None:
    """Train a policy, and evaluate it 20 times (--eval-freq 0) on the way."""
    own = dict(run=None, checkpoint_freq=-1, eval_freq=0)
    parser = Parser(train, "--env HalfCheetah-v5 --seed 1 -P", _find_hyperparameters, **own)
    parser.add_argument(
        "--checkpoint-freq", type=_steps, help="Save an exact checkpoint every n steps, from which `sb3-qsm resume` goes on"
    )
    _run_zoo("train", parser, arguments)


def resume(arguments: list[str]) -> None:
    """Go on with a run that was stopped or killed, in its folder, from its newest checkpoint."""
    parser = Parser(resume, "logs/qsm/HalfCheetah-v5_1")
    parser.add_argument("run", type=Path, help="folder of a run of `sb3-qsm train --checkpoint-freq N`")
    parser.add_argument("-n", "--n-timesteps", help="another number of steps of the whole run")
    args = parser.parse_args(arguments)
    if not list(args.run.glob("checkpoints/*_steps")):
        parser.error(f"no checkpoint in {args.run}: begin runs with `sb3-qsm train --checkpoint-freq N`")
    saved = _saved_arguments(next(args.run.glob("*/args.yml")).parent)
    saved |= {"run": str(args.run), "n_timesteps": args.n_timesteps or saved["n_timesteps"]}
    _known_task(saved["env"])
    given = SimpleNamespace(add_argument=lambda *_, **__: None, parse_args=lambda: argparse.Namespace(**saved))
    _run_zoo("train", given, arguments)


def optimize(arguments: list[str]) -> None:
    """Search hyperparameters with Optuna: the zoo's `train -optimize`."""
    example = "--env Hopper-v5 -n 5e4 --n-trials 100 --storage logs/hopper.log --study-name hopper"
    own = dict(run=None, checkpoint_freq=-1, optimize_hyperparameters=True)
    _run_zoo("train", Parser(optimize, example, _find_hyperparameters, **own), arguments)


def _enjoy_pretrained(arguments: list[str]) -> None:
    """Watch a policy that comes with the package."""
    from sb3_qsm.pretrained import load_pretrained, make_task, play

    parser = Parser(enjoy, "Ant-v5")
    parser.add_argument("task", help="environment ID")
    parser.add_argument("-n", "--n-episodes", type=int, default=3, help="number of episodes")
    parser.add_argument("--no-render", action="store_true", help="Do not render the environment")
    parser.add_argument("--stochastic", action="store_true", help="Use stochastic actions")
    parser.add_argument("--seed", type=int, default=0, help="Random generator seed")
    args = parser.parse_args(arguments)
    policy = load_pretrained(args.task)
    if not (args.no_render or _has_display()):
        parser.error(f"no display: film it with `sb3-qsm record --env {args.task} --pretrained`, or add --no-render")
    env = make_task(args.task, render_mode=None if args.no_render else "human")
    for episode_return in islice(play(policy, env, args.seed, not args.stochastic), args.n_episodes):
        print(f"Episode return: {episode_return:.2f}")
    env.close()


def enjoy(arguments: list[str]) -> None:
    """Watch a trained policy, or only count its returns (--no-render); `sb3-qsm enjoy Ant-v5` shows one that comes along."""
    if arguments and not arguments[0].startswith("-"):
        _enjoy_pretrained(arguments)
        return

    def check(parser: Parser, args: Any) -> None:
        if not (args.no_render or _has_display()):
            parser.error("no display: film it with `sb3-qsm record`, or add --no-render")
        _find_model(parser, args)

    _run_zoo("enjoy", Parser(enjoy, "--env HalfCheetah-v5", check), arguments)


def _follow(env: Any) -> None:
    """Robots of Gymnasium are filmed by the camera that goes with them; the one that films by default stays at the start."""
    (base,) = env.get_attr("unwrapped")
    if hasattr(base, "mujoco_renderer"):
        with suppress(KeyError):
            base.mujoco_renderer.camera_id = base.model.camera("track").id


def record(arguments: list[str]) -> None:
    """Film a trained policy, as mp4 or GIF."""
    parser = Parser(record, "--env HalfCheetah-v5 cheetah.gif -n 200")
    _add_run_options(parser)
    parser.add_argument("video", nargs="?", type=Path, help="file to write, .mp4 or .gif; by default in the folder of the run")
    parser.add_argument("-n", "--n-timesteps", type=_steps, default=1000, help="number of timesteps")
    parser.add_argument("--stochastic", action="store_true", help="Use stochastic actions")
    parser.add_argument("--pretrained", action="store_true", help="film the policy that comes with the package")
    args = parser.parse_args(arguments)
    import imageio

    predict: Callable[..., Any]
    if args.pretrained:
        from stable_baselines3.common.vec_env import DummyVecEnv

        from sb3_qsm.pretrained import load_pretrained, make_task

        predict, video = load_pretrained(args.env).predict, args.video or Path("video.mp4")
        env: Any = DummyVecEnv([lambda: make_task(args.env, render_mode="rgb_array")])
        env.seed(args.seed)
    else:
        model, env = _load(parser, args, render_mode="rgb_array")
        video = args.video or _find_model(parser, args)[1].with_name("video.mp4")

        def predict(obs: Any, deterministic: bool) -> Any:
            return model.predict(obs, deterministic=deterministic)[0]

    _follow(env)
    fps = env.metadata.get("render_fps", 30)
    options: Any = {"duration": 1000 / fps, "loop": 0} if video.suffix == ".gif" else {"fps": fps, "macro_block_size": 2}
    obs, writer = env.reset(), imageio.get_writer(video, **options)
    with writer:
        for _ in range(args.n_timesteps):
            writer.append_data(env.render())
            obs, *_ = env.step(predict(obs, deterministic=not args.stochastic))
    env.close()
    print(f"Video: {video}")


def export(arguments: list[str]) -> None:
    """Write a trained policy for other programs, as ONNX or safetensors."""
    parser = Parser(export, "--env HalfCheetah-v5 policy.onnx")
    _add_run_options(parser)
    parser.add_argument("file", type=Path, help="file to write, .onnx or .safetensors, which holds both kinds of actions")
    parser.add_argument("--stochastic", action="store_true", help="Use stochastic actions (.onnx)")
    args = parser.parse_args(arguments)
    if args.file.suffix not in (".onnx", ".safetensors"):
        parser.error(f"argument file: must end in .onnx or .safetensors, got {str(args.file)!r}")
    from sb3_qsm.export import export_onnx, save_policy

    model, _ = _load(parser, args)
    if args.file.suffix == ".onnx":
        export_onnx(model, args.file, deterministic=not args.stochastic)
    else:
        save_policy(model, args.file)
    print(f"Policy: {args.file}")


def share(arguments: list[str]) -> None:
    """Write a trained policy as a small file with a card of its returns; --repo uploads both to the Hugging Face Hub."""
    parser = Parser(share, "--env HalfCheetah-v5 policies --repo me/qsm-HalfCheetah-v5")
    _add_run_options(parser)
    parser.add_argument("destination", type=Path, help="folder to write the policy and its card to")
    parser.add_argument("--repo", help="repository of the Hub to upload them to; log in with `hf auth login` before")
    args = parser.parse_args(arguments)
    from sb3_qsm.pretrained import upload_policy, write_policy

    model, _ = _load(parser, args)
    saved = _saved_arguments(_find_model(parser, args)[1])
    command = ["sb3-qsm", "train", "--algo", args.algo, "--env", args.env, "--seed", model.seed, "-n", model.num_timesteps]
    for option, name in {"-params": "hyperparams", "--env-kwargs": "env_kwargs"}.items():
        command += [option, *(f"{key}:{value!r}" for key, value in saved[name].items())] if saved[name] else []
    if saved["conf_file"] and Path(saved["conf_file"]).parent != Path(__file__).parent / "hyperparams":
        command += ["-c", saved["conf_file"]]
    policy = write_policy(model, args.env, args.destination, shlex.join(map(str, command)))
    print(f"Policy: {policy}")
    if args.repo:
        print(f"Uploaded: {upload_policy(policy, args.repo)}")


def plot(arguments: list[str]) -> None:
    """Draw the evaluations of the newest run: learning_curve.png in its folder."""
    parser = Parser(plot, "-f logs")
    parser.add_argument("-f", "--folder", help="folder of runs, or of one")
    args = parser.parse_args(arguments)
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = sorted(Path(args.folder).rglob("evaluations.npz"), key=lambda path: path.stat().st_mtime)
    if not runs:
        parser.error(f"no evaluations.npz in {args.folder}; `sb3-qsm train` writes one")
    evaluations = np.load(runs[-1])
    mean, std = evaluations["results"].mean(axis=1), evaluations["results"].std(axis=1)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.fill_between(evaluations["timesteps"], mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.plot(evaluations["timesteps"], mean, marker=".")
    axes.set(title=runs[-1].parent.name, xlabel="Environment steps", ylabel="Return (mean and std of the episodes)")
    axes.grid(alpha=0.3)
    picture = runs[-1].parent / "learning_curve.png"
    figure.savefig(picture, dpi=150)
    print(f"Learning curve: {picture}")


def compare(arguments: list[str]) -> None:
    """Train several algorithms on one task, or go on with that, and write a page of curves, intervals and cost."""
    own: dict[str, Any] = dict(
        algos=["qsm", "sac", "td3"], steps=100_000, seeds=[0, 1, 2], folder=Path("logs/compare"), jobs=1
    )
    parser = Parser(compare, "--env Hopper-v5 --algos qsm sac td3 --steps 1e5 --seeds 0 1 2 --jobs 2", **own)
    parser.add_argument("--env", dest="task", required=True, help="environment ID, or package.module:ID for one of your own")
    parser.add_argument("--algos", nargs="+", help="algorithms of the benchmark")
    parser.add_argument("--steps", type=_steps, help="environment steps of each run")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of each algorithm")
    parser.add_argument("-f", "--folder", type=Path, help="folder of all comparisons")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    parser.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="run with Ray, here or in a cluster")
    args = parser.parse_args(arguments)
    _known_task(args.task)
    # In a clone the benchmarks stand beside the package, in a wheel within; the processes of the runs find the user's modules
    package, root = Path(__file__).parent, Path(__file__).parents[1]
    name = "sb3_qsm.benchmarks" if (package / "benchmarks").is_dir() else "benchmarks"
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    run = importlib.import_module(f"{name}.compare").compare
    page, n_failed = run(args.task, args.algos, args.steps, args.seeds, args.folder.resolve(), args.jobs, args.ray)
    print(f"Comparison: {page}")
    sys.exit(min(n_failed, 1))


COMMANDS: dict[str, Command] = {
    it.__name__: it for it in (train, enjoy, record, plot, compare, export, share, optimize, resume)
}


def _message(error: Exception) -> str | None:
    """What an error tells the user, with a remedy, or None if it was not raised to tell something."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    speaks = str(frame.f_globals.get("__name__")).partition(".")[0] in SPEAKING
    if not isinstance(error, gym.error.Error | ModuleNotFoundError) and not (
        speaks and isinstance(error, ValueError | TypeError | AssertionError | OSError)
    ):
        return None
    missing = str(getattr(error, "name", None)).partition(".")[0]
    remedy = [f'; pip install "sb3-qsm[{extra}]"' for extra, modules in EXTRAS.items() if missing in modules]
    return " ".join(f"{error}{''.join(remedy)}".split())


def main(arguments: list[str] | None = None) -> int:
    """
    :param arguments: command line, None for the program's
    :return: exit status: 0, 1 if a run of a comparison failed, 2 for an error of the user
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    does = "\n".join(f"  {name:<10}{it.__doc__}" for name, it in COMMANDS.items())
    epilog = f"commands:\n{does}\n\n`sb3-qsm train --help` shows the options of `train`, and so on."
    parser = argparse.ArgumentParser("sb3-qsm", description=__doc__, epilog=epilog, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"sb3-qsm {sb3_qsm.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.parse_args([command])
    if not _has_display():
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
    sys.path.insert(0, os.getcwd())  # tasks of the user
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file shows how far a training is
    try:
        COMMANDS[command](rest)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (message := _message(error)) is None:
            raise
        print(f"sb3-qsm {command}: error: {message}", file=sys.stderr)
        return 2
    return 0

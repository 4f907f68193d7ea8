"""
Trained policies that come with the package, and how one is written for others, with its card.
"""

from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_qsm.export import ExportedPolicy, load_policy, save_policy
from sb3_qsm.qsm import QSM

FOLDER = Path(__file__).parent / "trained"
USE = """
```python
from sb3_qsm.export import load_policy
from sb3_qsm.pretrained import make_task

policy, env = load_policy("{file}"), make_task("{task}")
observation, _ = env.reset()
action = policy.predict(observation, deterministic=True)
```
"""


def pretrained_tasks() -> list[str]:
    """
    :return: ids of the environments that a policy comes with the package for
    """
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.safetensors"))


def load_pretrained(task: str) -> ExportedPolicy:
    """
    :param task: id of an environment
    :return: the policy for it; ``policy.card`` says where it comes from and what it returns
    :raises ValueError: if none comes with the package
    """
    path = FOLDER / f"{task}.safetensors"
    if not path.is_file():
        raise ValueError(f"task must be one of {pretrained_tasks()}, got {task!r}")
    return load_policy(path)


def make_task(task: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """
    :param task: id of an environment
    :param kwargs: arguments of the environment
    :return: the environment, with dm_control's dictionaries of vectors made vectors
    """
    if task.startswith("dm_control/"):
        import shimmy  # noqa: F401  (registers them)

        return gym.wrappers.FlattenObservation(gym.make(task, **kwargs))
    return gym.make(task, **kwargs)


def play(policy: ExportedPolicy, env: gym.Env[Any, Any], seed: int = 0, deterministic: bool = True) -> Iterator[float]:
    """
    :param policy: policy to act with
    :param env: its environment
    :param seed: seed of the first episode; the others go on from there
    :param deterministic: whether to leave out all noise
    :return: return of one episode after the other, without end
    """
    obs, _ = env.reset(seed=seed)
    while True:
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy.predict(obs, deterministic))
            total, done = total + float(reward), terminated or truncated
        yield total
        obs, _ = env.reset()


def write_policy(model: QSM, task: str, folder: Path, command: str, n_episodes: int = 10) -> Path:
    """
    Write a small file of the policy, and beside it a card for people and for the Hugging Face Hub. The returns on the card are
    those of the policy in the file.

    :param model: trained model
    :param task: id of its environment
    :param folder: where to write ``<task>.safetensors`` and ``<task>.md``
    :param command: what trained the model
    :param n_episodes: deterministic episodes to play, from seed 0 on
    :return: file of the policy
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = folder / f"{task}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {"task": task, "n_timesteps": model.num_timesteps, "seed": model.seed, "command": command}
    card["versions"] = {name: version(name) for name in ("sb3_qsm", "stable_baselines3", "torch", "gymnasium")}
    save_policy(model, path, card, compact=True)
    episodes = play(load_policy(path), make_task(task))
    card["returns"] = [round(episode_return, 2) for episode_return in islice(episodes, n_episodes)]
    save_policy(model, path, card, compact=True)

    mean, std = np.mean(card["returns"]), np.std(card["returns"])
    data = ModelCardData(
        library_name="sb3_qsm",
        tags=["deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "diffusion-policy", task],
        model_name=f"QSM on {task}",
        eval_results=[
            EvalResult("reinforcement-learning", task, task, "mean_reward", f"{mean:.1f} +/- {std:.1f}", task_name=task)
        ],
    )
    text = (
        f"# QSM on {task}\n\nA diffusion policy learnt from rewards by Q-score matching, with sb3_qsm. Mean return "
        f"**{mean:.1f}**, standard deviation {std:.1f}, in {n_episodes} deterministic episodes, after "
        f"{model.num_timesteps} steps of training with seed {model.seed}:\n\n```bash\n{command}\n```\n"
        f"{USE.format(file=path.name, task=task)}\n"
        f"Versions: {', '.join(f'{name} {number}' for name, number in card['versions'].items())}. The file holds the running "
        "mean of the actor's weights in half precision, and no pickle.\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path.with_suffix(".md"))
    return path


def upload_policy(path: Path, repo: str) -> str:
    """
    :param path: file from :func:`write_policy`, whose card stands beside it
    :param repo: repository of the Hugging Face Hub, ``owner/name``, which is made if it is not there
    :return: its address
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    address = hub.create_repo(repo, exist_ok=True)
    hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    hub.upload_file(path_or_fileobj=path.with_suffix(".md"), path_in_repo="README.md", repo_id=repo)
    return str(address)

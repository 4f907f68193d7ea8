"""
Export a policy: to ONNX, or to one safetensors file that loads without pickle.

Both take the environment's own observations and return its own actions: what ``VecNormalize`` does to observations, and
the scaling of actions, are part of them.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_qsm.policies import CnnPolicy, DiffusionActor, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.qsm import QSM

FORMAT = 1
TOLERANCE = 1e-5
# Parts of the actor that learn: actions come through the slow copy of the representation, and not through pairs
NOT_FOR_ACTING = ("representation.", "slow_representation.pair_net.", "slow_representation.reward_and_end.")
POLICY_CLASSES: dict[str, type[DiffusionPolicy]] = {cls.__qualname__: cls for cls in (MlpPolicy, CnnPolicy, MultiInputPolicy)}


class ExportedPolicy(nn.Module):
    """
    The chain of a policy, from raw observations and noise to the environment's actions.

    :param actor: the policy's actor
    :param normalization: mean and standard deviation of observations and the largest normalised value, by key of the
        observation (``"observation"`` unless they are dictionaries)
    :param card: what is known of the policy
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(
        self, actor: DiffusionActor, normalization: dict[str, dict[str, th.Tensor]], card: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.actor = actor
        self.card = card or {}
        self.space, self.action_space = actor.observation_space, actor.action_space
        self.keys = list(self.space.spaces) if isinstance(self.space, spaces.Dict) else ["observation"]
        self.noise_shape = (1 + len(actor.levels), actor.action_dim)
        self.normalization = normalization
        self.register_buffer("low", th.as_tensor(self.action_space.low))
        self.register_buffer("high", th.as_tensor(self.action_space.high))
        actor.set_training_mode(False)

    def forward(self, noise: th.Tensor, *observations: th.Tensor, average: bool = False) -> th.Tensor:
        """
        :param noise: start of the chain and noise of each step, shape (1 + T, B, A)
        :param observations: one tensor of shape (B, ...), or one for each key
        :param average: whether to use the running mean of the weights, as for deterministic actions
        :return: actions, shape (B, ...)
        """
        obs = {}
        for key, value in zip(self.keys, observations, strict=True):
            if key in self.normalization:  # in the precision of the observations, as VecNormalize does it
                stats = self.normalization[key]
                value = ((value - stats["mean"]) / stats["std"]).clamp(-stats["clip"], stats["clip"])
            obs[key] = value
        inputs: PyTorchObs = obs if isinstance(self.space, spaces.Dict) else obs["observation"]
        scaled = self.actor.sample(inputs, noise, average)
        return self.low + 0.5 * (scaled.reshape(-1, *self.low.shape) + 1) * (self.high - self.low)

    def predict(self, observation: np.ndarray | dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """
        :param observation: one observation, or those of several environments, shape (B, ...); images in either order of axes
        :param deterministic: whether to leave out all noise
        :return: the action, or actions of shape (B, ...)
        """
        obs, several = self.actor.obs_to_tensor(observation)
        tensors = [obs[key] for key in self.keys] if isinstance(obs, dict) else [obs]
        n_draws, action_dim = self.noise_shape
        noise = (th.zeros if deterministic else th.randn)(n_draws, len(tensors[0]), action_dim)
        with th.no_grad():
            actions = self(noise, *tensors, average=deterministic and self.actor.has_average()).numpy()
        return actions if several else actions[0]


class _Deterministic(nn.Module):
    """An exported policy without its noise."""

    def __init__(self, exported: ExportedPolicy) -> None:
        super().__init__()
        self.exported = exported
        self.average = exported.actor.has_average()

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        n_draws, action_dim = self.exported.noise_shape
        return self.exported(th.zeros(n_draws, observations[0].shape[0], action_dim), *observations, average=self.average)


def exported_policy(model: QSM) -> ExportedPolicy:
    """
    :param model: trained model; its ``VecNormalize``, if it has one, goes along
    :return: a copy of its policy on the CPU, from raw observations to actions
    :raises ValueError: if the model is no QSM, or was trained on observations that ``VecNormalize`` had normalised and has
        lost it
    """
    if not isinstance(model, QSM):
        raise ValueError(f"model must be a QSM, got {type(model).__name__}")
    env = model.get_vec_normalize_env()
    if model.observations_normalized and (env is None or not env.norm_obs):
        raise ValueError("env must be the VecNormalize of the training, which holds its statistics: give it to QSM.load")
    normalization = {}
    if env is not None and env.norm_obs:
        all_stats = env.obs_rms if isinstance(env.obs_rms, dict) else {"observation": env.obs_rms}
        for key, stats in all_stats.items():
            std = np.sqrt(stats.var + env.epsilon)
            normalization[key] = {"mean": th.tensor(stats.mean), "std": th.tensor(std), "clip": th.tensor(float(env.clip_obs))}
    return ExportedPolicy(copy.deepcopy(model.actor).to("cpu"), normalization)


def export_onnx(model: QSM, path: str | Path, deterministic: bool = True) -> None:
    """
    Write the chain as an ONNX graph, and compare it with PyTorch on random observations before it gets its name.

    Inputs: ``observation``, shape (B, ...), in the type of the observation space (or one input for each key), and, unless
    deterministic, ``noise``, standard normal numbers of shape (1 + T, B, A). Output: ``action``, shape (B, ...).

    :param model: trained model
    :param path: file to write
    :param deterministic: whether to leave out all noise
    :raises ValueError: if the graph differs from PyTorch by more than 1e-5 of the range of an action, or if the key of an
        observation is "action" or "noise"; no file is left
    """
    import onnxruntime

    exported = exported_policy(model)
    if taken := {"action", "noise"} & set(exported.keys):
        raise ValueError(f"observation keys must differ from 'action' and 'noise' in an ONNX graph, got {sorted(taken)}")
    noise, *observations = _random_inputs(exported, n=2)
    batch = th.export.Dim("batch")
    per_row = tuple({0: batch} for _ in observations)
    aside = Path(path).with_name(f".{Path(path).name}.tmp")
    graph = (_Deterministic(exported) if deterministic else exported).eval()
    program = th.onnx.export(
        graph,
        tuple(observations) if deterministic else (noise, *observations),
        input_names=exported.keys if deterministic else ["noise", *exported.keys],
        output_names=["action"],
        dynamic_shapes=(per_row,) if deterministic else ({1: batch}, per_row),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    try:
        program.save(aside, external_data=False)
        session = onnxruntime.InferenceSession(aside, providers=["CPUExecutionProvider"])
        noise, *observations = _random_inputs(exported, n=64)
        inputs = dict(zip(exported.keys, [value.numpy() for value in observations], strict=True))
        (found,) = session.run(["action"], inputs if deterministic else {**inputs, "noise": noise.numpy()})
        with th.no_grad():
            expected = (graph(*observations) if deterministic else graph(noise, *observations)).numpy()
        difference = float(np.abs((found - expected) / (exported.high - exported.low).numpy()).max())
        if not difference <= TOLERANCE:
            raise ValueError(f"the ONNX graph must be within {TOLERANCE} of PyTorch, it differs by {difference}: not written")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_policy(model: QSM, path: str | Path, card: dict[str, Any] | None = None, compact: bool = False) -> None:
    """
    Write the policy to one safetensors file: the actor's weights, spaces, statistics of ``VecNormalize`` and, as JSON in its
    header, the arguments of the policy. No pickle.

    :param model: trained model
    :param path: file to write
    :param card: what the header shall say of the policy, as JSON knows it
    :param compact: whether to keep only the running mean of the weights, which draws actions then too, in half precision: a
        quarter of the size
    :raises ValueError: if a space is neither a box nor a dictionary of boxes, or the policy a class of your own
    """
    if type(model.policy) not in POLICY_CLASSES.values():
        raise ValueError(f"policy must be one of {sorted(POLICY_CLASSES)}, got {type(model.policy).__qualname__}")
    exported = exported_policy(model)
    boxes = {f"observation_space.{key}": box for key, box in zip(exported.keys, _boxes(exported.space), strict=True)}
    state = {name: value for name, value in exported.actor.state_dict().items() if not name.startswith(NOT_FOR_ACTING)}
    if compact:
        means = [name.removeprefix("average.") for name in state if name.startswith("average.")]
        state = {name: value.half() if value.ndim > 1 else value for name, value in state.items() if name not in means}
    tensors = {f"actor.{name}": value.contiguous() for name, value in state.items()}
    for name, box in [*boxes.items(), ("action_space", exported.action_space)]:
        tensors |= {f"{name}.{bound}": th.tensor(getattr(box, bound)) for bound in ("low", "high")}
    for key, stats in exported.normalization.items():
        tensors |= {f"normalization.{key}.{name}": value for name, value in stats.items()}
    header = {
        "format": FORMAT,
        "policy_class": type(model.policy).__qualname__,
        "policy_kwargs": _literals(model.policy_kwargs),
        "dictionary": isinstance(exported.space, spaces.Dict),
        "keys": exported.keys,  # in the order of the policy's inputs, which tensors have not
        "card": card or {},
        "compact": compact,
    }
    aside = Path(path).with_name(f".{Path(path).name}.tmp")
    aside.write_bytes(save(tensors, metadata={"sb3_qsm": json.dumps(header)}))
    os.replace(aside, path)


def load_policy(path: str | Path, policy_kwargs: dict[str, Any] | None = None) -> ExportedPolicy:
    """
    :param path: file from :func:`save_policy`
    :param policy_kwargs: those of the model, needed only if they hold functions or classes
    :return: the policy
    :raises ValueError: if the file is another or broken, or if it needs ``policy_kwargs``
    """
    try:
        content = Path(path).read_bytes()  # not mapped: the file may change later
        tensors = load(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"]["sb3_qsm"])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}, this version reads format {FORMAT}")
        if policy_kwargs is None and header["policy_kwargs"] is None:
            raise ValueError("policy_kwargs must be given again, as the file holds no functions, classes or objects")
        boxes = [(key, _box(f"observation_space.{key}", tensors)) for key in header["keys"]]
        policy = POLICY_CLASSES[header["policy_class"]](
            spaces.Dict(boxes) if header["dictionary"] else boxes[0][1],
            _box("action_space", tensors),
            lr_schedule=lambda _: 0.0,
            **(header["policy_kwargs"] if policy_kwargs is None else policy_kwargs),
        )
        state = _under("actor.", tensors)
        state |= {name: value for name, value in policy.actor.state_dict().items() if name.startswith(NOT_FOR_ACTING)}
        policy.actor.load_state_dict(state | _under("average.", state) if header.get("compact") else state)
        normalization: dict[str, dict[str, th.Tensor]] = {}
        for name, value in _under("normalization.", tensors).items():
            key, stat = name.rsplit(".", 1)
            normalization.setdefault(key, {})[stat] = value
        if any(stats.keys() != {"mean", "std", "clip"} for stats in normalization.values()):
            raise ValueError(f"normalization must have mean, std and clip, got {normalization}")
        return ExportedPolicy(policy.actor, normalization, header.get("card"))
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"policy {path} refused: {error}") from error


def _literals(policy_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments as JSON gives them back, None if it cannot: classes and functions are no data."""
    try:
        return json.loads(json.dumps(policy_kwargs))
    except TypeError:
        return None


def _box(name: str, tensors: dict[str, th.Tensor]) -> spaces.Box:
    low, high = (tensors[f"{name}.{bound}"].numpy() for bound in ("low", "high"))
    return spaces.Box(low, high, dtype=low.dtype.type)


def _under(prefix: str, tensors: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _boxes(space: spaces.Space[Any]) -> list[Any]:
    boxes = list(space.values()) if isinstance(space, spaces.Dict) else [space]
    if not all(isinstance(box, spaces.Box) for box in boxes):
        raise ValueError(f"observation_space must be a box or a dictionary of boxes, got {space}")
    return boxes


def _random_inputs(exported: ExportedPolicy, n: int) -> list[th.Tensor]:
    """Noise and observations, which leave the random numbers of a training as they are; at most 20 wide, but for images."""
    rng = np.random.default_rng(0)
    inputs = [th.as_tensor(rng.standard_normal((exported.noise_shape[0], n, exported.noise_shape[1]), np.float32))]
    for box in _boxes(exported.space):
        low = np.maximum(box.low, np.minimum(-10.0, box.high - 20.0))
        high = np.minimum(box.high, low + (255.0 if box.dtype == np.uint8 else 20.0))
        inputs.append(th.as_tensor(rng.uniform(low, high, size=(n, *box.shape)).astype(box.dtype)))
    return inputs

"""
What the objects of a run hold, as plain data: JSON, and arrays on the side. Nothing here can build an object or run code:
a state is written back into objects that are already there.
"""

import functools
import hashlib
import inspect
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_qsm.resume._storage import Arrays

# Configuration, which the user's own code builds again before a state is written back. A function counts as such whatever it
# closes over: RescaleAction's holds a factor, and that another one holds a list to which it appends cannot be told from it
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, np.ufunc)
DEFINITIONS = (*FUNCTIONS, type, types.ModuleType, np.dtype, th.dtype, th.device, EnvSpec)
CONFIGURATION = (*DEFINITIONS, VecEnv, BaseCallback)
# Attributes of SB3's and Gymnasium's wrappers that hold no state of a run: open files, renderers, tables of methods, arguments
STATELESS = ("results_writer", "mujoco_renderer", "class_attributes", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")
INNER = ("envs", "env", "venv")
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


class OpaqueError(ValueError):
    """An object holds something that is no data: its state cannot be taken."""


class Capture:
    """
    Turns values into JSON; their arrays are collected.

    :param arrays: filled with the arrays, by the path of the value
    :param strict: objects are taken too, and one that is not made of data raises :class:`OpaqueError`; otherwise
        attributes that are no data are left out
    """

    def __init__(self, arrays: Arrays, strict: bool = True) -> None:
        self.arrays = arrays
        self.strict = strict
        self.seen: dict[int, Any] = {}  # the objects themselves, so that no id is used twice

    def attributes(self, path: str, instance: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
        """The attributes of an object that are data; if strict, one that is no configuration either is an OpaqueError."""
        self.seen[id(instance)] = instance
        found = {}
        for name, value in vars(instance).items():
            # The digest of an MjModel goes with its MjData
            passed_over = id(value) in self.seen or isinstance(value, CONFIGURATION) or _is_mujoco(value, "MjModel")
            if name not in (*STATELESS, *leave_out) and not passed_over:
                try:
                    found[name] = self.value(f"{path}.{name}", value)
                except OpaqueError:
                    if self.strict:
                        raise
        return found

    def value(self, path: str, value: Any) -> Any:
        """JSON for data, or for an object made of data; anything else is an OpaqueError."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is list:
            return [self.value(f"{path}.{i}", item) for i, item in enumerate(value)]
        for kind, (matches, take, _) in KINDS.items():
            if matches(value) and (self.strict or kind not in ("object", "definition")):
                return {"kind": kind, **take(self, path, value)}
        raise OpaqueError(f"{path}, {type(value)}, is no data")

    def array(self, path: str, array: np.ndarray) -> dict[str, Any]:
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise OpaqueError(f"{path} (array of {array.dtype}) is no data")
        while path in self.arrays:
            path += "_"
        self.arrays[path] = np.array(array, order="C")  # a copy, which later steps do not change
        return {"array": path}


def restore(data: Any, arrays: Arrays, current: Any = None) -> Any:
    """The value that was captured; written into the object that is there where the two are of a kind."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        there = current if isinstance(current, list | tuple) and len(current) == len(data) else [None] * len(data)
        return [restore(item, arrays, old) for item, old in zip(data, there, strict=True)]
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        raise ValueError(f"unknown kind of data: {data!r:.80}")
    return KINDS[data["kind"]][2](data, arrays, current)


def restore_attributes(instance: Any, data: dict[str, Any], arrays: Arrays) -> None:
    """Give an object the attributes that :meth:`Capture.attributes` took."""
    for name, value in data.items():
        if name.startswith("__"):
            raise ValueError(f"{name} is no attribute that a capture takes")
        setattr(instance, name, restore(value, arrays, getattr(instance, name, None)))


def _is_plain(value: Any) -> bool:
    """Whether the attributes are all the state of an object: Python's own rule for what it may copy by default."""
    if not hasattr(value, "__dict__") or isinstance(value, list | dict | tuple | set | th.nn.Module | type):
        return False
    methods = ("__getstate__", "__reduce__", "__reduce_ex__")
    if any(getattr(type(value), method, None) is not getattr(object, method, None) for method in methods):
        return False
    try:
        value.__reduce_ex__(2)
    except TypeError:  # it holds more than its attributes
        return False
    return True


def _give_object(data: Any, arrays: Arrays, current: Any) -> Any:
    if type(current).__qualname__ != data["class"]:
        raise ValueError(f"an object of class {data['class']} was expected, got {type(current).__qualname__}")
    restore_attributes(current, data["attributes"], arrays)
    return current


def _give_definition(data: Any, arrays: Arrays, current: Any) -> Any:
    if not isinstance(current, DEFINITIONS):
        raise OpaqueError(f"a function or class was expected, got {current!r:.80}")
    return current


def _take_dict(capture: Capture, path: str, value: dict[Any, Any]) -> dict[str, Any]:
    return {"items": [[capture.value(path, key), capture.value(f"{path}.{key}", item)] for key, item in value.items()]}


def _give_dict(data: Any, arrays: Arrays, current: Any) -> Any:
    old = current if isinstance(current, dict) else {}
    pairs = [(restore(key, arrays), value) for key, value in data["items"]]
    new = {key: restore(value, arrays, old.get(key)) for key, value in pairs}
    old.clear()
    old.update(new)
    return old


def _take_sequence(capture: Capture, path: str, value: Any) -> dict[str, Any]:
    return {"items": [capture.value(f"{path}.{i}", item) for i, item in enumerate(value)]}


def _give_tensor(data: Any, arrays: Arrays, current: Any) -> th.Tensor:
    tensor = th.from_numpy(arrays[data["array"]].copy())
    if not isinstance(current, th.Tensor) or current.shape != tensor.shape or current.dtype != tensor.dtype:
        return tensor
    with th.no_grad():  # in place: it may be shared with a network
        current.copy_(tensor)
    return current


def _take_generator(capture: Capture, path: str, value: Any) -> dict[str, Any]:
    generator = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
    return {"state": capture.value(path, generator.state)}


def _give_generator(data: Any, arrays: Arrays, current: Any) -> Any:
    state = restore(data["state"], arrays)
    if state["bit_generator"] not in BIT_GENERATORS:
        raise ValueError(f"unknown random generator: {state['bit_generator']!r:.80}")
    new = getattr(np.random, state["bit_generator"])()
    new.state = state
    if isinstance(current, np.random.Generator) and type(current.bit_generator) is type(new):
        current.bit_generator.state = state  # in place: it may be shared
        return current
    return np.random.RandomState(new) if data["kind"] == "random_state" else np.random.Generator(new)


def _give_torch_generator(data: Any, arrays: Arrays, current: Any) -> th.Generator:
    generator = current if isinstance(current, th.Generator) else th.Generator()
    generator.set_state(th.from_numpy(arrays[data["array"]].copy()))
    return generator


def _take_space(capture: Capture, path: str, value: spaces.Space[Any]) -> dict[str, Any]:
    """Only the random numbers of a space can change."""
    return {"np_random": capture.value(path, value._np_random), "parts": capture.value(path, _parts(value))}


def _give_space(data: Any, arrays: Arrays, current: Any) -> spaces.Space[Any]:
    if not isinstance(current, spaces.Space):
        raise ValueError(f"a space was expected, got {current!r:.80}")
    current._np_random = restore(data["np_random"], arrays, current._np_random)
    restore(data["parts"], arrays, _parts(current))
    return current


def _parts(space: spaces.Space[Any]) -> dict[Any, spaces.Space[Any]]:
    """The spaces inside a dictionary or tuple of spaces."""
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    return dict(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else {}


def _is_mujoco(value: Any, name: str) -> bool:
    """Whether a value is an object of MuJoCo, which is there only if an environment has imported it."""
    return "mujoco" in sys.modules and isinstance(value, getattr(sys.modules["mujoco"], name))


def _model_digest(model: Any) -> str:
    import mujoco

    content = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return hashlib.sha256(content.tobytes()).hexdigest()


def _take_mujoco(capture: Capture, path: str, value: Any) -> dict[str, Any]:
    import mujoco

    # The integration state alone is not enough: rewards of Ant and Humanoid use positions and forces that lag one substep
    # behind it. They are numbers of fixed size; what belongs to the solver (efc_*) is computed anew in each step.
    state = np.empty(mujoco.mj_stateSize(value.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(value.model, value, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    numbers = {name: getattr(value, name, None) for name in dir(value) if not name.startswith(("_", "efc_"))}
    numbers = {name: array for name, array in numbers.items() if isinstance(array, np.ndarray) and array.dtype == np.float64}
    fields = capture.value(f"{path}.fields", numbers)
    return {"state": capture.array(f"{path}.state", state), "fields": fields, "model": _model_digest(value.model)}


def _give_mujoco(data: Any, arrays: Arrays, current: Any) -> Any:
    import mujoco

    if data["model"] != _model_digest(current.model):
        raise OpaqueError("the MjModel is another: an environment that changes its model cannot be restored")
    state = np.ascontiguousarray(arrays[data["state"]["array"]])
    mujoco.mj_setState(current.model, current, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(current.model, current)
    for name, array in restore(data["fields"], arrays).items():
        if getattr(current, name).shape == array.shape:
            getattr(current, name)[...] = array
    mujoco.mj_setState(current.model, current, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return current


# Each kind of value: what belongs to it, how it becomes JSON, how JSON becomes the value
KINDS: dict[str, tuple[Callable[[Any], bool], Callable[..., dict[str, Any]], Callable[[Any, Arrays, Any], Any]]] = {
    "definition": (lambda value: isinstance(value, DEFINITIONS), lambda capture, path, value: {}, _give_definition),
    "tuple": (
        lambda value: type(value) is tuple,
        _take_sequence,
        lambda data, arrays, current: tuple(restore(data["items"], arrays, current)),
    ),
    "dict": (lambda value: isinstance(value, dict), _take_dict, _give_dict),
    "deque": (
        lambda value: type(value) is deque,
        lambda capture, path, value: {**_take_sequence(capture, path, value), "maxlen": value.maxlen},
        lambda data, arrays, current: deque(restore(data["items"], arrays), maxlen=data["maxlen"]),
    ),
    "array": (
        lambda value: type(value) is np.ndarray,
        Capture.array,
        lambda data, arrays, current: arrays[data["array"]].copy(),
    ),
    "scalar": (
        lambda value: isinstance(value, np.generic),
        lambda capture, path, value: capture.array(path, np.asarray(value)),
        lambda data, arrays, current: arrays[data["array"]][()],
    ),
    "tensor": (
        lambda value: isinstance(value, th.Tensor),
        lambda capture, path, value: capture.array(path, value.detach().cpu().numpy()),
        _give_tensor,
    ),
    "generator": (lambda value: isinstance(value, np.random.Generator), _take_generator, _give_generator),
    "random_state": (lambda value: isinstance(value, np.random.RandomState), _take_generator, _give_generator),
    "torch_generator": (
        lambda value: isinstance(value, th.Generator),
        lambda capture, path, value: capture.array(path, value.get_state().numpy()),
        _give_torch_generator,
    ),
    "space": (lambda value: isinstance(value, spaces.Space), _take_space, _give_space),
    "mujoco": (functools.partial(_is_mujoco, name="MjData"), _take_mujoco, _give_mujoco),
    "object": (
        _is_plain,
        lambda capture, path, value: {"class": type(value).__qualname__, "attributes": capture.attributes(path, value)},
        _give_object,
    ),
}


def env_layers(env: VecEnv) -> Iterator[tuple[str, Any]]:
    """Name and object of each wrapper and environment, from the outside in."""
    layer: Any = env
    while isinstance(layer, VecEnvWrapper):
        yield type(layer).__qualname__, layer
        layer = layer.venv
    yield type(layer).__qualname__, layer
    for i, sub_env in enumerate(layer.envs if isinstance(layer, DummyVecEnv) else []):
        while isinstance(sub_env, gym.Wrapper):
            yield f"{i}.{type(sub_env).__qualname__}", sub_env
            sub_env = sub_env.env
        yield f"{i}.{type(sub_env).__qualname__}", sub_env


def capture_env(path: str, env: VecEnv, arrays: Arrays) -> dict[str, Any]:
    """
    The state of an environment as JSON. If it has one that cannot be taken, ``opaque`` says why, and only the wrappers of the
    vectorised environment have one.
    """
    layers = list(env_layers(env))
    wrappers = sum(isinstance(layer, VecEnvWrapper) for _, layer in layers)
    reason = None if isinstance(layers[-1][1], gym.Env) else f"{layers[-1][0]} has its environments elsewhere"
    capture, some = Capture(arrays), Capture(arrays, strict=False)
    capture.seen.update((id(layer), layer) for _, layer in layers)  # they are passed over in the layers around them
    states: list[Any] = []
    for name, layer in layers if reason is None else layers[:wrappers]:
        layer_path = f"{path}.{len(states)}.{name}"
        try:
            states.append(capture.attributes(layer_path, layer, leave_out=INNER))
        except Exception as error:  # whatever goes wrong in a look at objects of any kind: they have no state to take
            reason = str(error)
            states.append(some.attributes(layer_path, layer, leave_out=INNER))
    return {"layers": states if reason is None else states[:wrappers], "opaque": reason}


def restore_env(env: VecEnv, data: dict[str, Any], arrays: Arrays) -> str | None:
    """Put an environment with the same layers where the captured one was; returns why this was not possible, if it was not."""
    for (_, layer), state in zip(env_layers(env), data["layers"], strict=False):
        try:
            restore_attributes(layer, state, arrays)
        except OpaqueError as error:
            return str(error)
    return data["opaque"]


def capture_random(arrays: Arrays) -> dict[str, Any]:
    """The random states of this process: Python, NumPy, PyTorch."""
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_initialized() else []
    values = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": th.get_rng_state()}
    return Capture(arrays).value("random", {**values, "cuda": [state.clone() for state in cuda]})


def restore_random(data: Any, arrays: Arrays) -> None:
    """Set what :func:`capture_random` took."""
    states = restore(data, arrays)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(state, device)


def callbacks_by_name(root: BaseCallback) -> dict[str, BaseCallback]:
    """The callback of a training and those inside it, by class and order."""
    found: dict[str, BaseCallback] = {}

    def walk(callback: BaseCallback) -> None:
        if callback in found.values():
            return
        if type(callback) is not CallbackList:  # which SB3 makes and which holds nothing else
            count = sum(type(other) is type(callback) for other in found.values())
            found[f"{type(callback).__qualname__}_{count}"] = callback
        for value in vars(callback).values():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, BaseCallback):
                    walk(child)

    walk(root)
    return found


def arguments_of(instance: Any) -> tuple[str, ...]:
    """Names of the arguments of an object's constructor and of those that it inherits."""
    constructors = [vars(cls)["__init__"] for cls in type(instance).__mro__ if "__init__" in vars(cls) and cls is not object]
    return tuple(name for constructor in constructors for name in inspect.signature(constructor).parameters)


def describe(value: Any) -> Any:
    """
    JSON for an argument, by which two of them are compared: data by value, functions and classes by name, other objects by
    what they print as or, if that is their place in memory, by class.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(describe(key)): describe(item) for key, item in value.items()}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in repr(value) else repr(value)

import multiprocessing
import os

# Small networks run faster on one thread, and several test processes do not fight for cores; the programs that tests start,
# too: a run that goes on with another number of threads rounds differently
os.environ["OMP_NUM_THREADS"] = "1"

import torch as th

th.set_num_threads(1)

# What takes long to import, once for all processes that tests start
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["sb3_contrib", "sb3_qsm.resume", "torch._dynamo", "gymnasium.envs.mujoco.inverted_pendulum_v5", "pytest"]
)

import os

# Small networks run faster on one thread, and several test processes do not fight for cores; the programs that tests start,
# too: a run that goes on with another number of threads rounds differently
os.environ["OMP_NUM_THREADS"] = "1"

import torch as th

th.set_num_threads(1)

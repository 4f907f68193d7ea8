import torch as th

# Small networks run faster on one thread, and several test processes do not fight for cores
th.set_num_threads(1)

"""A rank that sees GPUs which are not there: `… DEVICE GPUS_OF_RANK_0 GPUS_OF_RANK_1 …`."""

import os
import sys

import torch

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError

device, *seen = sys.argv[1:]
distributed._visible_gpus = lambda: list(seen[int(os.environ["RANK"])])
torch.cuda.set_device = sys.exit  # there is nothing to go on with
try:
    distributed.initialize(device)
except InputError as error:
    sys.exit(str(error))

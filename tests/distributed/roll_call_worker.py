"""A rank that meets the others in one collective after another, for ever: `… TIMEOUT_MINUTES`.

Rank 0 comes a second later than the others, so what they see at once, it sees after that second
and its timeout.
"""

import sys
import time

import torch

from dreamprm_dist import distributed

distributed.initialize("cpu", float(sys.argv[1]))
print("begun", flush=True)
try:
    with distributed.naming_lost_ranks():
        while True:
            time.sleep(distributed.rank() == 0)
            distributed.all_reduce_sum(torch.zeros(1))
except distributed.RankLostError as error:
    sys.exit(str(error))

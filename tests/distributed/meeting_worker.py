"""A rank that sees GPUs which are not there: `… DEVICE GPUS_OF_RANK_0 GPUS_OF_RANK_1 …`.

Rank 1 reads what all see two seconds after rank 0, which has ended by then if it does not wait.
"""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError


class LateReader:
    def __init__(self, store: torch.distributed.Store):
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if name == "multi_get":
            time.sleep(2)
        return getattr(self._store, name)


def rendezvous_of_a_late_reader(*arguments, **options) -> Iterator[tuple]:
    for store, *numbers in rendezvous(*arguments, **options):
        yield LateReader(store), *numbers


def say_what_is_started(backend: str, device_id: torch.device, **_) -> None:
    tf32 = torch.backends.cudnn.allow_tf32
    sys.exit(f"{backend} on {device_id}, as {chosen[0]}, TF32 {tf32}")


device, *seen = sys.argv[1:]
rendezvous = torch.distributed.rendezvous
if os.environ["RANK"] == "1":
    torch.distributed.rendezvous = rendezvous_of_a_late_reader
distributed._visible_gpus = lambda: list(seen[int(os.environ["RANK"])])
chosen: list[torch.device] = []
torch.cuda.set_device = chosen.append
torch.distributed.init_process_group = say_what_is_started  # there is nothing to go on with
try:
    distributed.initialize(device)
except InputError as error:
    sys.exit(str(error))

"""Alias of `data_tools.decontaminate`: the name that the command had."""

from data_tools.decontaminate import main
from dreamprm_dist.flags import run

if __name__ == "__main__":
    run(main)

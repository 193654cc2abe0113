"""Benchmarks that PRMs are compared on by the labels of single steps, one per file."""

from dreamprm_dist.evaluation.benchmarks.base import Benchmark
from dreamprm_dist.evaluation.benchmarks.prmbench import PRMBENCH
from dreamprm_dist.evaluation.benchmarks.processbench import PROCESSBENCH
from dreamprm_dist.evaluation.benchmarks.visualprocessbench import VISUALPROCESSBENCH

BENCHMARKS: dict[str, Benchmark] = {
    "visualprocessbench": VISUALPROCESSBENCH,
    "processbench": PROCESSBENCH,
    "prmbench": PRMBENCH,
}

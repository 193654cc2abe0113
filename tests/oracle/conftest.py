"""A small problem in float64.

transformers' RMSNorm computes in float32 whatever the model's dtype, which would limit every
comparison to about 1e-7; the fixture replaces it by the same formula in the model's own dtype.
"""

from pathlib import Path

import pytest
from problem import Problem
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dreamprm_dist.prm.model import load_prm, load_tokenizer


def exact_rms_norm(self, hidden):
    variance = hidden.square().mean(-1, keepdim=True)
    return self.weight * (hidden * (variance + self.variance_epsilon).rsqrt())


@pytest.fixture
def problem(tiny_prm_dir: Path, tiny_shards: Path, monkeypatch) -> Problem:
    monkeypatch.setattr(Qwen2RMSNorm, "forward", exact_rms_norm)
    prm = load_prm(str(tiny_prm_dir), "fp32").double()
    return Problem(prm, load_tokenizer(str(tiny_prm_dir)), tiny_shards)

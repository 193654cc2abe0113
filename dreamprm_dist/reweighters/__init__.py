"""Reweighters: how instance weights are held and learned. One per file, by name in REWEIGHTERS."""

from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.reweighters.domain_table import DomainTable
from dreamprm_dist.reweighters.fixed import Fixed
from dreamprm_dist.reweighters.instance_net import InstanceNet
from dreamprm_dist.reweighters.instance_table import InstanceTable
from dreamprm_dist.reweighters.uniform import Uniform

REWEIGHTERS: dict[str, type[Reweighter]] = {
    "instance_table": InstanceTable,
    "instance_net": InstanceNet,
    "domain_table": DomainTable,
    "fixed": Fixed,
    "uniform": Uniform,
}

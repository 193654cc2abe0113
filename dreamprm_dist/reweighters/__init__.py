"""Reweighters: how instance weights are held and learned. One a file, by name in REWEIGHTERS."""

from dreamprm_dist.reweighters.domain_table import DomainTable
from dreamprm_dist.reweighters.instance_net import InstanceNet
from dreamprm_dist.reweighters.instance_table import InstanceTable
from dreamprm_dist.reweighters.uniform import Uniform

REWEIGHTERS = {
    "instance_table": InstanceTable,
    "instance_net": InstanceNet,
    "domain_table": DomainTable,
    "uniform": Uniform,
}

"""Reweighters: how instance weights are held and learned. One a file, by name in REWEIGHTERS."""

from dreamprm_dist.reweighters.instance_table import InstanceTable

REWEIGHTERS = {"instance_table": InstanceTable}

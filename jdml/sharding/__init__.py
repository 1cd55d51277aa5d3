"""Meshes, logical-axis rules, sharded creation, and a check that asked = obtained."""

from jdml.sharding.compiled import Collective, bytes_per_axis, collectives
from jdml.sharding.constrain import constrain, no_mesh, use_rules
from jdml.sharding.mesh import make_mesh
from jdml.sharding.optimizer import gradient_specs, optimizer_specs
from jdml.sharding.place import init, lower_init, shard, shardings, unpad
from jdml.sharding.rules import Rules, infer_fsdp
from jdml.sharding.specs import specs

__all__ = [
    "Collective",
    "Rules",
    "bytes_per_axis",
    "collectives",
    "constrain",
    "gradient_specs",
    "infer_fsdp",
    "init",
    "lower_init",
    "make_mesh",
    "no_mesh",
    "optimizer_specs",
    "shard",
    "shardings",
    "specs",
    "unpad",
    "use_rules",
]

"""Meshes, logical-axis rules, sharded creation, and a check that asked = obtained."""

from jdml.sharding import presets
from jdml.sharding.check import check, check_compiled
from jdml.sharding.compiled import Collective, bytes_per_axis, collectives
from jdml.sharding.constrain import constrain, no_mesh, use_rules
from jdml.sharding.describe import Description, describe
from jdml.sharding.draw import describe_mesh, show
from jdml.sharding.hosts import (
    Host,
    barrier,
    broadcast_from_first,
    check_fingerprint,
    global_batch,
    initialize,
)
from jdml.sharding.mesh import make_mesh
from jdml.sharding.optimizer import gradient_specs, optimizer_specs, zero_specs
from jdml.sharding.overlap import ASYNCHRONOUS_ON_TPU, Overlap, overlap, program_flops
from jdml.sharding.place import init, lower_init, shard, shardings, unpad
from jdml.sharding.rules import Rules, Without, infer_fsdp
from jdml.sharding.snapshot import assert_matches_snapshot
from jdml.sharding.specs import specs

__all__ = [
    "ASYNCHRONOUS_ON_TPU",
    "Collective",
    "Description",
    "Host",
    "Overlap",
    "Rules",
    "Without",
    "assert_matches_snapshot",
    "barrier",
    "broadcast_from_first",
    "bytes_per_axis",
    "check",
    "check_compiled",
    "check_fingerprint",
    "collectives",
    "constrain",
    "describe",
    "describe_mesh",
    "global_batch",
    "gradient_specs",
    "infer_fsdp",
    "init",
    "initialize",
    "lower_init",
    "make_mesh",
    "no_mesh",
    "optimizer_specs",
    "overlap",
    "presets",
    "program_flops",
    "shard",
    "shardings",
    "show",
    "specs",
    "unpad",
    "use_rules",
    "zero_specs",
]

"""What a run would cost before it runs: meshes ranked by a roofline, the best compiled for real.

    python -m jdml.plan --model llama3-8b --topology v5e:16x16 --batch 256 --seq 4096

Reading order: ``hardware``, ``topology``, ``layout``, ``algorithm``; ``shares``, ``tables``,
``traffic``, ``memory``, ``roofline`` (the formulas); ``program`` (the compiler); ``planner``,
``report``, ``picture``.
"""

from jdml.plan.algorithm import Algorithm, parse_algorithm
from jdml.plan.candidates import layouts
from jdml.plan.layout import Layout
from jdml.plan.memory import Memory
from jdml.plan.planner import Case, Plan, make_plan
from jdml.plan.program import Compiled, DoesNotFit
from jdml.plan.roofline import Prediction
from jdml.plan.topology import Topology, parse_topology

__all__ = [
    "Algorithm",
    "Case",
    "Compiled",
    "DoesNotFit",
    "Layout",
    "Memory",
    "Plan",
    "Prediction",
    "Topology",
    "layouts",
    "make_plan",
    "parse_algorithm",
    "parse_topology",
]

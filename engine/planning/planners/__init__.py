"""The table of planners, by name."""

from typing import Final

from engine.planning.planners.base import Planner
from engine.planning.planners.fixed import plan_fixed
from engine.planning.planners.milp import plan_milp

PLANNERS: Final[dict[str, Planner]] = {"fixed": plan_fixed, "milp": plan_milp}

"""Planning: a recipe and a network in, a plan out, nothing built."""

from kw_lightning.planning.plan import plan
from kw_lightning.planning.stages import Stage, find_stages
from kw_lightning.planning.types import Count, LayerPlan, Plan, StaticLayer, WarehousePlan

__all__ = ["Count", "LayerPlan", "Plan", "Stage", "StaticLayer", "WarehousePlan", "find_stages", "plan"]

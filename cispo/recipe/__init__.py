"""Recipes: what a run does, as a file with few settings; a mistake in it is found before anything starts."""

from cispo.recipe.load import load_sft_recipe, load_train_recipe
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.recipe.schema import EvaluationSettings, PolicySettings, TrainRecipe
from cispo.recipe.sft_schema import SftRecipe

__all__ = [
    "EvaluationSettings",
    "PolicySettings",
    "RolloutSettings",
    "SftRecipe",
    "TrainRecipe",
    "load_sft_recipe",
    "load_train_recipe",
]

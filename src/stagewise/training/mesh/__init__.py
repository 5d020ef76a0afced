"""A recipe on a mesh: pipelines side by side.

1. `recipe_mesh` checks before anything starts that a recipe can use the axes that were asked for,
   and says what its Pipeline gets.
2. `data_parts` gives every data rank its part of the recipe's batches.
"""

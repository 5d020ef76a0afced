"""Recipes to start from, written by `stagewise init`.

1. `command` is that command: it finds out what its argument names, and writes the recipe.
2. The recipes are `plain`, `vision` and `hugging_face`: text with a few places to fill. They
   train as they are, on data that the user replaces.
"""

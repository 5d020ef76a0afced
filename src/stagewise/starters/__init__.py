"""Recipes to start from, which `stagewise init` writes.

1. `plain`, `vision` and `hugging_face` are texts with a few places to fill in.
2. They train as they are, on data that the user then replaces.
"""

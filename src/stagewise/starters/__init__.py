"""Recipes to start from, which `stagewise init` of the command line writes.

1. `plain`, `vision` and `hugging_face` are text with a few places to fill.
2. They train as they are, on data that the user replaces.
"""

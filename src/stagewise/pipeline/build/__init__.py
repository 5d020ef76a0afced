"""From a model and a plan to this rank's stages.

1. `refusals`: what cannot be pipelined is named before anything is built.
2. `places`: which ranks run each cell, which device holds each stage.
3. `ties`: which parameters several of them share.
4. `initial`: values are made or loaded, and equal on all ranks that share them.
"""

"""From a model and a plan to this rank's stages.

1. `whole_model`: all ranks agree on the model, the plan and the options.
2. `refusals`: what cannot be pipelined is named before anything is built.
3. `initial`: values are made or loaded for this rank's cells.
4. `places`: which ranks run each cell, which device holds each stage; the stages are made.
5. `ties`: which parameters several stages share, equal on all their ranks from now on.
6. `recut`: later, another plan makes other stages of the same cells.
"""

"""From a model and a plan to this rank's stages.

1. `whole_model`: all ranks agree on the model, the plan and the options.
2. `refusals`: raises for models that cannot be pipelined, before anything is built.
3. `initial`: creates or loads the values of this rank's cells.
4. `places`: which ranks run each cell and which device holds each stage; builds the stages.
5. `ties`: ties parameters that several stages share, and makes their copies equal.
6. `parallelise`: the caller shards this rank's stages. `assemble` runs steps 4 to 6.
7. `recut`: later, builds other stages from the same cells, for another plan.
"""

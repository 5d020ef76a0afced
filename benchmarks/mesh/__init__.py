"""Whether pipelines on a mesh compute what the plain model does, in float64 on gloo processes.

1. `subjects`: the models, in cells that any of the others can shard.
2. `inner`: what is done to each stage beside the pipeline, and the mesh that it needs.
3. `compare`: three AdamW steps on the ranks of a mesh, and of the plain model; the differences.
4. `table`: which combinations, and their rows; `__main__` prints them.
5. `torch_side`: the same cells by torch.distributed.pipelining. `checkpoints`: saved under some
   meshes, loaded under others.
6. `unshards`: what gathers cost that run beside compute, on emulated devices.
"""

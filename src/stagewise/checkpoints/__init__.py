"""A model's tensors on disk, under the plain model's names.

1. `names` lists the names under which a checkpoint may hold each tensor.
2. `saving`: every rank writes its own tensors, rank 0 the index, which is put in place last.
3. `sources` open checkpoints of stagewise and others without reading values, also under other
   names (`renamed`); `untrusted` keeps a folder from running code.
4. `loading` compares shapes and dtypes on every rank, then reads each rank's own tensors.
5. `exporting` turns a checkpoint of training into safetensors.
"""

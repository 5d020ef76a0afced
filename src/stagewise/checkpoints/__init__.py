"""A model's tensors on disk, under the plain model's names.

1. `names` says under which names a checkpoint may hold them.
2. `saving`: every rank writes its own tensors, rank 0 the index, put in place last.
3. `sources` open what was saved, here or by others, without reading values; `untrusted` keeps
   a folder from running code.
4. `loading` compares forms on every rank, then reads each rank's own tensors.
"""

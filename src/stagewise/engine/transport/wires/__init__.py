"""Bytes from rank to rank.

1. `wire` is what every wire does; `peers` names a rank that does not answer.
2. `group_wire` is torch.distributed's, over groups that `new_group` makes; `sockets` carry small
   tensors where `connect_sockets` can connect ranks.
3. `staged` takes an accelerator's tensors through the host's memory to any of them.
4. A `group` of ranks sums and gathers together.
"""

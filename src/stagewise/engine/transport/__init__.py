"""How values get from rank to rank, and how ranks agree.

1. `connect` chooses devices and wires for a plan, and gives the rank its `transport`: mail, ranks.
2. A `wire` carries bytes. `group_wire` is torch.distributed's; `sockets` take what is small,
   between ranks that `connect_sockets` can connect; `peers` names who does not answer.
3. `mailbox` knows which message comes next and in what form (`message_form`; `forms` that both ends
   remember; `local_classes` in them). In one process a dictionary does for it (`local`).
4. `ranks` is how ranks agree, give and sum; in `rendezvous` they hear that they make the same call.
5. `failure`: what a rank that fails tells the others. `processes`: torch.distributed's own, before
   they are ranks of a pipeline.
"""

"""How values travel between ranks, and how ranks agree.

1. `connect` finds a plan's devices, and returns the rank's `transport`: mail, ranks. On a
   `device_mesh` pipelines run side by side.
2. `choose_wires` says which of `wires/` carry bytes.
3. `mailbox` knows which message comes next and its form (`message_form`). Both ends remember
   `forms`, in which `local_classes` and DTensors (`spread_values`) may occur. In one process a
   dictionary suffices (`local`).
4. `ranks` is how ranks agree, exchange and sum (`side_group`: for a thread beside training). All
   Pipelines of a process group share a `rendezvous`, which checks that they make the same call.
5. `pretended`: a mesh whose other ranks are not there, for estimates.
6. `failure`: what a failing rank tells the others. `processes`: those of torch.distributed, before
   they become ranks of a pipeline.
"""

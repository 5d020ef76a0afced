"""How values get from rank to rank, and how ranks agree.

1. `connect` chooses devices and a transport for a plan.
2. `transport` is the seam; `distributed` the one between processes, made of the next three.
3. `wire` carries bytes: what is small between processes of one host through `unix_sockets`;
   `outbox` keeps alive what is being sent, `peers` says who does not answer.
4. `mailbox` knows which message comes next and in what form (`message_form`; `forms` that both ends
   remember; `local_classes` in them).
5. `rendezvous` is where all ranks agree on what they are there for.
6. `group` is the ranks that hold one stage. `failure`: what a rank that fails tells the others.
"""

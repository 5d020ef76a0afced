"""How values get from rank to rank, and how ranks agree.

1. `connect` chooses devices and a transport for a plan.
2. `transport` is the seam; `distributed` the one between processes.
3. `message_form` says what a message's receiver must know before its tensors arrive.
4. `unix_sockets` carry what is small between processes of one host; `outbox` keeps alive what is
   being sent.
5. `group` is the ranks that hold one stage. `failure`: what a rank that fails tells the others.
"""

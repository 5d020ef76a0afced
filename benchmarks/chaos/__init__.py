"""Faults at random places of small training runs: named, ended, resumed, nothing lost.

1. `faults` lists them: what strikes where, and which words must name it.
2. `strike` makes them happen, inside the workers that train `recipe`.
3. `trial` runs one fault and its resumption, and looks at what is left; `processes` finds and ends
   all processes of a trial, `forked` starts workers without a launcher.
4. `damage` spoils the last checkpoint. `calls` tries a `loop` of one's own, of which one rank makes
   another call than the rest.
5. `torch_side` lets the same faults strike `torch_loop`, with torch.distributed.pipelining.
6. `__main__` draws the faults from a seed; `summary` makes a table of the rows, by kind of fault.
"""

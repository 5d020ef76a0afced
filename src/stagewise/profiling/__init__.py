"""Costs of cells and links.

1. Measured: `example` runs `trial_steps` here, on all ranks at once; an accelerator holds the cells
   `in_turn`. `sized_mail` notes the sizes of messages, `links` times them; `live_memory` follows
   what stages keep.
2. Estimated, for other devices: `estimate` runs each kind of cell once on `fakes`
   (`estimate_chain`, `estimate_cell`) as a stage of the engine, and counts with `op_counter`;
   `message_shape` is a message without its tensors.
"""

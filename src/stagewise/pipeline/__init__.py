"""What a user calls: `plan`, `Pipeline`, `GPipe`, `GradScaler`.

1. `plan` measures the model's cells and links and hands them to the planner.
2. `pipeline.Pipeline` builds this rank's stages (`build`). Its `calls` (`step`, `evaluate`,
   `predict`) run through `engine.step`; its `share` of the model has the plain model's names.
   What a step that recomputed has freed, `free_pages` gives back to the system.
3. `gpipe` is the same with the paper's and torchgpipe's arguments; `scaler` is torch's GradScaler
   whose decisions all ranks share.
"""

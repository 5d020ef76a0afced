"""What a user calls: `plan`, `Pipeline`, `GPipe`, `GradScaler`.

1. `plan` measures the model's cells and links and hands them to the planner.
2. `pipeline.Pipeline` builds this rank's stages (`build`) and runs calls through `engine.step`.
3. `gpipe` is the same with the paper's and torchgpipe's arguments; `scaler` is torch's GradScaler
   whose decisions all ranks share.
"""

"""What a user calls: `plan`, `Pipeline`, `GPipe`, `GradScaler`.

1. `plan_model` measures the model's cells and links and passes the costs to the planner;
   `searched_plan` searches with them, lets the best plans run in turn (`contest`, `trials`), and
   keeps the fastest. `device_speeds` times the same cells on each device; `plan_keywords` says what
   a wrong keyword argument should be.
2. `pipeline.Pipeline` builds this rank's stages (`build`). Its `calls` (`step`, `evaluate`,
   `predict`) run through `engine.step`; `measuring` says where their time and memory went
   (`record`); `generates` continues prompts (`generation`). Its `share` of the model keeps the
   plain model's names.
3. `gpipe` is the same with the arguments of the GPipe paper and torchgpipe; `scaler` is torch's
   GradScaler with decisions shared by all ranks.
"""

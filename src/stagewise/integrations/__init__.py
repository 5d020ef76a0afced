"""Trainers of other libraries, with the model cut over their processes.

1. `transformers` has `PipelineTrainer`, transformers' Trainer whose model is a Pipeline, built in
   the `first_step` as `pipeline_arguments` say; `unsupported` refuses what it cannot do.
2. `one_batch` lets accelerate give every process the same batches; `stand_in` is called in place of
   the model, so that the trainer's own loss code runs on the outputs of the last stage.
3. `lightning` has `PipelineStrategy`, for Lightning's Trainer: the `first_step` is the same, of a
   LightningModule the `cut_module` is spread, its training_step runs on outputs of the last stage
   as that loss code does, and may change nothing of its `own_state`; what it has `logged` for
   microbatches is put together, and gradients are handed over as the `known_gradients` of its loss.
4. `trl` has `PipelineSFTTrainer`, of trl's SFTTrainer, whose fused head it computes from logits.
5. `accumulated` makes the batches of an update the microbatches of one step; `own_part` frees the
   parameters of other processes, and puts together what they save.

Only these modules import the other libraries, so import them by their own names.
"""

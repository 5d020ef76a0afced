"""What a run keeps besides its model, in forms that a checkpoint can hold.

1. `plain_values` turns tensors, numbers and text, in any containers, into bytes.
2. `optimizer_state`: an optimizer's, by parameter name (`optimizers`: several as one);
   `schedules`: a learning-rate schedule's; `own_objects`: those that a recipe adds, such as
   averages of parameters.
3. `random_states`: the process's generators.
4. `run_state` gathers all of it, and puts it back; `kept_buffers` are those before a step.
5. `pretrained`: a configuration and a tokenizer of transformers, for an export.
"""

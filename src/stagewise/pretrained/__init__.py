"""Models of Hugging Face: from a folder into a pipeline, and back into a folder.

1. `building`: the model is built on the meta device, with new adapters of PEFT if asked for, and
   every process reads only its own tensors (`peft_names` says under which names they are saved).
2. `quantised`: weights that transformers' quantisers make while they are read, to 4 bits
   `in_blocks`.
3. `folders`: the trained model as a folder for transformers, or its adapters as one for PEFT.
"""

"""Compare captured cells with the plain model before they are returned.

1. `observed` runs the model a few times, to find what it keeps between calls and whether it draws
   random numbers (`rare_draws`: including extreme ones).
2. `other_sizes` makes batches of other sizes from the example.
3. `compare` runs the cells (`in_parts`, like stages) and the model on them in every `situation`;
   `differences` measures how far two tensors are apart.
4. `model_errors` turns whatever fails meanwhile into ModelError.
"""

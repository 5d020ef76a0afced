"""Whether captured cells are the plain model, before they are given out.

1. `observed` runs the model a few times: what it keeps from call to call, and where it draws
   (`rare_draws`: at the ends of what may be drawn).
2. `other_sizes` makes batches of other sizes from the example.
3. `compare` runs cells (`in_parts`, as stages do) and model on them in every `situation`;
   `differences` is how far two tensors are apart.
4. `in_words`: whatever fails meanwhile is said in words.
"""

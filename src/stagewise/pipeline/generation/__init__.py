"""`pipe.generate`: transformers' `generate`, with the model's layers spread over ranks.

1. `bare_model`: the model's modules without its values, kept by a Pipeline; `prompts` are checked.
2. `spread`: every rank runs the model's forward, in which it computes its own `shared_units`.
3. `turns`: parts of the prompts take turns, so that ranks are busy at the same time.
4. `generating` puts these together: one rank chooses tokens, and tells the others.
"""

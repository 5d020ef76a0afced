"""What the Python code of a forward sees, asks and keeps, besides the values of tensors.

1. `users_code` tells the user's code from torch's and ours, and finds the line that was running.
2. `contents` is what can be seen in an object (`large`: in one too large to be looked at item by
   item); `visible`, all that a forward's code can see.
3. `watch`: whether that is still what it was when the model was captured; `library`: and what it
   uses of libraries.
4. `asked`: what a forward asks that a trace decides once.
"""

"""What the Python code of a forward reads, asks and keeps, besides the values of tensors.

1. `users_code` separates the user's code from torch's and ours, and finds the running line.
2. `contents` lists what can be seen in an object (`large`: a digest if it is too large); `visible`
   lists everything that a forward's code can see.
3. `watch` notices changes of that since the model was captured; `library`, of what it uses of
   libraries.
4. `slots` lists the places that code can write to, of which a `viewpoint` takes snapshots;
   `carried` finds what cells carry in them from one microbatch to another, or leave for each other.
5. `asked` records what a forward asks that a trace fixes; `kernel_settings` are those of torch that
   choose between kernels.
"""

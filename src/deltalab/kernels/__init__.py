"""Floor 1: what training passes compute faster or in less memory, each beside a plain reference that tests compare it with.

A kernel is a short autograd.Function on plain tensors; it knows no model and no method. Which of them run where is decided
in `deltalab.deltas.fuse`.
"""

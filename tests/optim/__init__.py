"""The torch adapters, held to what a torch.optim optimizer must do to work where people use it.

Tests name these demands by number, `test_r5_...`:

| | demand |
|---|---|
| R1 | State exists from construction; asking for it before training changes nothing |
| R2 | Every key of the state is there, with its final shape, before anything is loaded |
| R3 | Values in `state[p]` are tensors, numbers, or dicts of them by name |
| R4 | `state` has parameters alone for keys; groups hold numbers and strings, no objects |
| R5 | A loaded tensor keeps the dtype that it was saved in |
| R6 | Loading matches parameters by position, for ids may be names |
| R7 | deepcopy and pickle copy all that a step needs, and leave the original alone |
| R8 | Parameters that are exchanged in their groups are followed by position |
| R9 | A latent that was not saved is taken from the parameter |
| R10 | `param_groups` is a list of dicts; the learning rate is read at every step, tensors too |
| R11 | A real subclass of Optimizer, with defaults, whose `step` schedulers can wrap |
| R12 | Takes tensors, dicts and (name, parameter) pairs; groups can be added later |
| R13 | `step(closure)` first runs the closure, with gradients, at the weights; returns its value |
| R14 | A parameter without a gradient is skipped |
| R15 | A step that GradScaler skips advances nothing |
| R16 | Modes, if there are any, can be entered twice and lose nothing when saved |
| R17 | Parameters sharded by `fully_shard` train as on one process; uneven and empty shards too |
| R18 | State that was sharded is saved, and loaded on other numbers of ranks |
| R19 | Work is done on local shards where rows are whole, on the gathered tensor elsewhere |
| R20 | Parameters are written in place and stay leaves |
| R21 | The functional loop refuses a module that is sharded |
| R22 | A compiled step has no graph break and is not compiled again from step to step |
"""

import parq_fn.foundation.command  # noqa: F401 # while a program is imported, too, it ends in a line

"""How the losses of samples become one."""

# As csrc/reduction.h numbers them.
REDUCTIONS = ("none", "sum", "mean")

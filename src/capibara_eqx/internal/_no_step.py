# What padding has for a step size before softplus: so far below where exp underflows
# that the step is exactly zero, and so is its gradient, in every dtype.
NO_STEP = -1e4

"""The optimizers: one file of pure functions each."""

"""One applied surgery: what was decided, and its forwards, backwards, steps and tensors."""

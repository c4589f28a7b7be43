"""Steps and epochs of training: gradients, updates, losses, batches, early stopping, checkpoints."""

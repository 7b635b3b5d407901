"""What the training scripts share: arguments, losses, optimizer groups, data order, checkpoints, reports."""

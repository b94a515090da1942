"""Training: the depth codebook, the objectives and the trainer."""

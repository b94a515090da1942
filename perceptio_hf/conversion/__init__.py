"""Foreign checkpoints in, stock checkpoints out: readers, maps of their keys, and folders that appear complete."""

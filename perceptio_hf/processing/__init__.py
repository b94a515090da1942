"""From pictures and words to tensors, and from generated tokens to masks, depth maps and answers."""

"""What models learn from: samples and their sources, depth maps, masks, mixtures.

Imports the world and the processor, knows no trainer.
"""

"""Teaching attention where to look: which places are right, and the loss. Imports the losses' labels and the tokens."""

"""The command `perceptio`: one thin file for each sub-command, light to import. Nothing below imports it."""

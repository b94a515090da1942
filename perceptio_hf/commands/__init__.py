"""The command `perceptio`: one file per sub-command, all of them light to import."""

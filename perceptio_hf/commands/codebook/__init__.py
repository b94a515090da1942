"""`perceptio codebook`: train, evaluate and use a depth codec; `app.py` joins the sub-commands, `sources.py` finds the
maps that `--data` names."""

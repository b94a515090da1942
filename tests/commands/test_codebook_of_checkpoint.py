"""`perceptio codebook` takes the codec out of a whole checkpoint too."""

import json

from perceptio_hf.commands import main


def test_eval_of_a_checkpoint_s_codec(tiny_folder, capsys):
    assert main.run(["codebook", "eval", str(tiny_folder), "--maps", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["maps"] == 3

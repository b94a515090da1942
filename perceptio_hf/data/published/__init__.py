"""Published data sets as sources of a recipe: RefCOCO's family, COCO, ADE20K, depth labels, the Hub.

Each file reads one kind; `perceptio_hf.data.tasks` lists them as sources. Imports what else is in `data`.
"""

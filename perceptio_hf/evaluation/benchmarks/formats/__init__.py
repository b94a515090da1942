"""Files that several published benchmarks use: Hub tables, pickled records, COCO's masks. Imports `data` only."""

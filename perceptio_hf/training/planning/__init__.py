"""What a training will cost before it begins: memory per device, samples, tokens, hours.

Imports the trainer's parts and `data`; commands print what is found here.
"""

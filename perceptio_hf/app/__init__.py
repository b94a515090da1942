"""The page of `perceptio app` and its HTTP interface: pictures, questions, masks, depth and points in a browser.

Imports all below; only commands import it.
"""

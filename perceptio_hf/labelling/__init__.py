"""Depth labels for pictures: a teacher's depth in the codes of a codec, and questions that can be answered from it.
`perceptio label` uses it, and training of a codebook takes its teacher.

Imports bulk and what is below.
"""

"""Long work over many pictures: what they are, in which batches and on which engine they are worked on, and the journal
that a killed run goes on from. `perceptio predict` and `eval` use it.

Knows no model: a job says what is done with a batch. Imports data and what is below.
"""

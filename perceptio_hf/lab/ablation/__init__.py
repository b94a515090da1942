"""What each part of the objective contributes: variants, their figures, the report.

Imports the lessons and all below.
"""

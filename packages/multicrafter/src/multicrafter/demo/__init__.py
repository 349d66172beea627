"""The demonstration on the drawn world: both stages, their evaluation, figures, a report."""
